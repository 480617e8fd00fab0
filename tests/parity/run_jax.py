"""Our side."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import speech_flax
from speech_flax.conversion.transformers_names import from_torch_names, to_torch_names

from .variant import BATCHES, Variant, inputs, probe, random_weight

_FLOAT_INPUTS = ("input_features", "input_values")
#: The same operations in the same order, but machine code that is made twice as fast: these models run twice.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def build(variant: Variant, compatibility: str = "transformers-4.37", **changes: Any) -> tuple[Any, Any]:
    """The module, and parameters drawn by their names in Transformers."""
    config_class = getattr(speech_flax, f"{variant.family}Config")
    config = config_class.from_dict(variant.fields | changes | {"compatibility": compatibility})
    module = getattr(speech_flax, variant.model)(config)
    arguments = {name: value for name, value in inputs(variant, "masked").items() if name in _FLOAT_INPUTS}
    shapes = jax.eval_shape(module.init, jax.random.key(0), **arguments)["params"]
    names = to_torch_names(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    return module, from_torch_names({name: random_weight(name, value.shape) for name, value in names.items()})


def compute(module: Any, has_labels: bool) -> Callable[..., tuple[Any, Any, Any]]:
    """A jitted function of parameters and inputs that returns loss, outputs and gradients."""

    def loss_and_output(params: Any, arguments: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        output = module.apply({"params": params}, **arguments, output_hidden_states=True, output_attentions=True)
        if has_labels:
            return output.loss, output
        last = output.to_tuple()[0]
        return (last * probe(last.shape)).sum(), output

    @partial(jax.jit, compiler_options=QUICK)
    def run(params: Any, arguments: dict[str, jax.Array]) -> tuple[Any, Any, Any]:
        (loss, output), gradients = jax.value_and_grad(loss_and_output, has_aux=True)(params, arguments)
        return loss, output, gradients

    return run


@cache
def run(variant: Variant, compatibility: str) -> dict[str, dict[str, np.ndarray]]:
    """Results by batch, named as those of the reference. One compilation serves all batches."""
    module, params = build(variant, compatibility)
    function = compute(module, variant.labels is not None)
    return {batch: _results(function, params, inputs(variant, batch)) for batch in BATCHES}


def _results(function: Callable[..., Any], params: Any, arguments: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    size = next(arguments[name].shape[:2] for name in _FLOAT_INPUTS if name in arguments)
    loss, output, gradients = function(params, {"attention_mask": jnp.ones(size, jnp.int32)} | arguments)
    results = {"loss": loss}
    for name in type(output).__dataclass_fields__:
        value = getattr(output, name)
        if isinstance(value, tuple):
            results |= {f"{name}.{index}": one for index, one in enumerate(value)}
        elif value is not None and name != "loss":
            results[name] = value
    results |= {f"gradients.{name}": value for name, value in to_torch_names(gradients).items()}
    return {name: np.asarray(value) for name, value in results.items()}
