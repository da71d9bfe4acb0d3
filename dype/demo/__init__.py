"""The demo model: scenes, training, and scores of its images."""
