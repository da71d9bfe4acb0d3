"""Get a pipeline ready: what it is, where it fits, what makes its steps cheaper."""
