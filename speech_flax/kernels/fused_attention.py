"""Attention without a tensor of queries and keys: the best formulation for the platform, with its own gradient."""

import dataclasses
from collections.abc import Callable, Sequence
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
Merged = Float[Array, "batch frames lanes"]

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
    batch, frames, heads, head_size = query.shape
    query, key, value = (states.reshape(batch, frames, heads * head_size) for states in (query, key, value))
    # With all scores 0 a row without any frame gives all keys the same probability, as the definition does.
    some = mask.any(-1)
    query = jnp.where(some[:, None, None], query * head_size**-0.5, 0)
    seeds = jnp.zeros((batch, heads), jnp.int32) if seeds is None else seeds
    left, embeddings = (None, None) if positions is None else (positions.left, positions.embeddings)
    operands = query, key, value, mask | ~some[:, None], embeddings, seeds
    return _fused(formulation(left, dropout_rate), heads, *operands).reshape(batch, frames, heads, head_size)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(formulation: Formulation, heads: int, *operands: Array | None) -> Merged:
    """Attention of states whose heads lie side by side. So they are kept for the backward pass, too: XLA:TPU gives
    arrays of single heads a layout of their own, and would copy them for the kernels."""
    return _merge(formulation.forward(*_split(operands, heads))[0])[0]


def _forward(formulation: Formulation, heads: int, *operands: Array | None) -> tuple[Merged, tuple]:
    attended, logsumexp = formulation.forward(*_split(operands, heads))
    attended, logsumexp = (checkpoint_name(array, ATTENTION) for array in (*_merge(attended), logsumexp))
    return attended, (*operands, attended, logsumexp)


def _backward(formulation: Formulation, heads: int, residuals: tuple, cotangent: Merged) -> tuple:
    *operands, attended, logsumexp = residuals
    attended, cotangent = _split((attended, cotangent), heads)
    *of_states, of_embeddings = formulation.backward(*_split(operands, heads), attended, logsumexp, cotangent)
    return *_merge(*of_states), None, of_embeddings, None


_fused.defvjp(_forward, _backward)


def _split(operands: Sequence[Array | None], heads: int) -> tuple[Array | None, ...]:
    """The first operands, up to three of states, by head; the others as they are."""
    states = [array.reshape(*array.shape[:2], heads, -1) for array in operands[:3]]
    return *states, *operands[3:]


def _merge(*states: States) -> tuple[Merged, ...]:
    return tuple(array.reshape(*array.shape[:2], -1) for array in states)
