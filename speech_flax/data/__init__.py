"""From data sets to batches of static shape."""
