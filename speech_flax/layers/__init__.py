"""Building blocks of the models: pure functions of their inputs, parameters and random keys."""
