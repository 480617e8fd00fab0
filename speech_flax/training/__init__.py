"""Experiments: configuration, training step, sharding, checkpoints, loop, evaluation."""
