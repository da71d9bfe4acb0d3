"""Metrics of the images of a finished sweep."""
