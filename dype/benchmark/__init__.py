"""Measure the cost of DyPE."""
