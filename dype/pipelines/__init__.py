"""Load a pipeline, place it in memory, and accelerate its steps."""
