"""Parameters of small models."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def random_parameters(model: nn.Module, *inputs: Any, seed: int = 0, **named_inputs: Any) -> dict:
    """Parameters of ``model``, none of them trivial.

    They are drawn here because compiling a model's own initialisers takes longer than a test.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs, **named_inputs)["params"]
    random = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = 0.45 * random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values + 1 if path[-1].key in ("scale", "weight_g") else values)

    return jax.tree_util.tree_map_with_path(draw, shapes)
