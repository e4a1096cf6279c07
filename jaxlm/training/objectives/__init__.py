"""Losses, and the reference models that some of them ask."""
