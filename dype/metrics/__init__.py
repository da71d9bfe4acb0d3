"""What the images of a finished sweep score."""
