"""Many images: lists of settings, what is there already, tables and contact sheets."""
