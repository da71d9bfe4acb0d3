"""The paper's figures, and some that it lacks."""
