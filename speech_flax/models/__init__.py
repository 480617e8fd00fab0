"""The model families and their heads."""
