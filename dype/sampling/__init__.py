"""Generate images with a loaded pipeline."""
