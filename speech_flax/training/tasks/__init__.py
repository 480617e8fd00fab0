"""What can be learned, one module per kind of task."""
