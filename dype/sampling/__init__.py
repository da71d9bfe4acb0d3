"""Generate images with a pipeline that is loaded."""
