"""Checkpoints of other frameworks: readers, name rules in both directions, evidence of parity."""
