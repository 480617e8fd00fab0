"""One operation, computed by another formula on the CPU than on accelerators."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

Formula = Callable[..., Array]


def by_platform(*, cpu: Formula, default: Formula) -> Formula:
    """A function of arrays that is ``cpu`` on the CPU and ``default`` elsewhere; both compute the same numbers.

    The gradient is taken of the chosen formula alone: differentiating ``lax.platform_dependent`` itself would keep what
    the gradients of both need.
    """

    @jax.custom_vjp
    def chosen(*arguments: Any) -> Array:
        return lax.platform_dependent(*arguments, cpu=cpu, default=default)

    def forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
        return chosen(*arguments), arguments

    def gradient_of(formula: Formula) -> Callable[..., tuple[Array, ...]]:
        return lambda cotangent, *arguments: jax.vjp(formula, *arguments)[1](cotangent)

    def backward(arguments: tuple[Any, ...], cotangent: Array) -> tuple[Array, ...]:
        return lax.platform_dependent(cotangent, *arguments, cpu=gradient_of(cpu), default=gradient_of(default))

    chosen.defvjp(forward, backward)
    return chosen
