"""The choice between formulations by the platform that a program is for."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def for_platform(*operands: Any, default: Callable[..., Any], **formulations: Callable[..., Any]) -> Any:
    """Like ``jax.lax.platform_dependent``, but traces nothing for other platforms where a mesh says which one it is.

    Args:
        *operands: What the formulations take.
        default: The formulation of platforms without one of their own.
        **formulations: By platform: ``cpu``, ``tpu`` or ``cuda``.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform in ("cpu", "tpu"):
        return formulations.get(device.platform, default)(*operands)
    return lax.platform_dependent(*operands, default=default, **formulations)
