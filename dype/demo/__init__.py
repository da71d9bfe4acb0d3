"""The demo model: its scenes, its training, and how its images are judged."""
