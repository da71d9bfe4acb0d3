"""What DyPE costs."""
