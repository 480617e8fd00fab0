"""Attention without a tensor of queries and keys: the best formulation for the platform, with its own gradient."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels.blocked_attention import BlockedAttention
from speech_flax.kernels.flash_attention import FlashAttention
from speech_flax.kernels.platforms import for_platform
from speech_flax.kernels.positions import RelativeKey

try:
    from speech_flax.kernels.gpu_attention import GPUAttention
except ImportError:  # JAX comes without Triton where there is no CUDA for it, on Windows
    GPUAttention = None

States = Float[Array, "batch frames heads head_size"]

#: What the backward pass needs of the forward pass has this name for policies of rematerialisation.
ATTENTION = "attention"


@runtime_checkable
class Formulation(Protocol):
    """One way to compute attention and its gradient.

    Both passes take queries (scaled), keys, values, a mask with a key that counts in every row, the embeddings of
    relative keys or ``None``, and the seeds of dropout. ``left`` is the largest distance to the left with an embedding.
    """

    left: int | None
    dropout_rate: float

    def forward(self, *operands: Array | None) -> tuple[States, Float[Array, "batch heads frames"]]:
        """Attended values, and logarithms of the sums of exponentiated scores."""

    def backward(self, *operands: Array | None) -> tuple[States, States, States, Array | None]:
        """Gradients of queries, keys, values and embeddings; also takes what ``forward`` returned and the cotangent."""


@dataclasses.dataclass(frozen=True)
class PlatformAttention:
    """Chooses by the platform that the program is lowered for, and by shape: a kernel on TPUs and GPUs, else blocks."""

    left: int | None
    dropout_rate: float

    def forward(self, *operands: Array | None) -> tuple[States, Float[Array, "batch heads frames"]]:
        return self._choose("forward", *operands)

    def backward(self, *operands: Array | None) -> tuple[States, States, States, Array | None]:
        return self._choose("backward", *operands)

    def _choose(self, direction: str, query: States, *operands: Array | None):
        _, frames, _, head_size = query.shape
        kernels = {}
        if (tpu := FlashAttention(self.left, self.dropout_rate)).suits(frames, head_size):
            kernels["tpu"] = getattr(tpu, direction)
        if GPUAttention and (gpu := GPUAttention(self.left, self.dropout_rate)).suits(head_size):
            kernels["cuda"] = getattr(gpu, direction)
        # With relative keys the gradient of short inputs is a quarter faster in blocks that the cache of a core holds.
        longest = 64 if self.left is not None and frames <= 1024 else 128
        blocked = getattr(BlockedAttention(self.left, self.dropout_rate, longest), direction)
        return for_platform(query, *operands, default=blocked, **kernels)


def fused_attention(
    query: States,
    key: States,
    value: States,
    mask: Bool[Array, "batch frames"],
    positions: RelativeKey | None = None,
    seeds: Int[Array, "batch heads"] | None = None,
    *,
    dropout_rate: float = 0.0,
    formulation: Callable[[int | None, float], Formulation] = PlatformAttention,
) -> States:
    """The attended values of :func:`~speech_flax.kernels.attention.attend`, without the probabilities."""
    batch, _, heads, head_size = query.shape
    # With all scores 0 a row without any frame gives all keys the same probability, as the definition does.
    some = mask.any(-1)
    query = jnp.where(some[:, None, None, None], query * head_size**-0.5, 0)
    seeds = jnp.zeros((batch, heads), jnp.int32) if seeds is None else seeds
    left, embeddings = (None, None) if positions is None else (positions.left, positions.embeddings)
    return _fused(formulation(left, dropout_rate), query, key, value, mask | ~some[:, None], embeddings, seeds)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(formulation: Formulation, *operands: Array | None) -> States:
    return formulation.forward(*operands)[0]


def _forward(formulation: Formulation, *operands: Array | None) -> tuple[States, tuple]:
    attended, logsumexp = (checkpoint_name(array, ATTENTION) for array in formulation.forward(*operands))
    return attended, (*operands, attended, logsumexp)


def _backward(formulation: Formulation, residuals: tuple, cotangent: States) -> tuple:
    *of_states, of_embeddings = formulation.backward(*residuals, cotangent)
    return *of_states, None, of_embeddings, None


_fused.defvjp(_forward, _backward)
