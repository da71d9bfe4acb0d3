"""Generate many images: lists of values, finished images, tables and contact sheets."""
