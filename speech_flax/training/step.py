"""One training step and one evaluation step: pure functions of state and batch, jitted over a mesh.

On the device: front end, SpecAugment, model, loss, gradients, clipping, AdamW. What is random in a step depends on the
experiment's seed and the step's number alone.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from speech_flax.training.task import RowResults, Task

RANDOM_STREAMS = ("dropout", "spec_augment", "layer_drop")


@flax.struct.dataclass
class TrainState:
    """Everything that changes in training, and all that a checkpoint holds.

    ``step`` counts batches, skipped ones included; ``skipped`` counts those whose loss or gradient was not finite, and
    ``skipped_in_a_row`` the last uninterrupted run of them.
    """

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]

    @classmethod
    def create(cls, params: PyTree, optimizer: optax.GradientTransformation) -> "TrainState":
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, params, optimizer.init(params), zero, zero)


@flax.struct.dataclass
class StepMetrics:
    """Sums over the global batch; ``loss`` is per utterance, as it is differentiated."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    utterances: Int[Array, ""]
    infeasible: Int[Array, ""]
    audio_samples: Float[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def _micro_batches(batch: dict[str, Array], accumulation: int) -> dict[str, Array]:
    """Every ``accumulation``-th row to the same micro-batch, so that rows stay on their devices."""

    def split(rows: Array) -> Array:
        return rows.reshape(rows.shape[0] // accumulation, accumulation, *rows.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    accumulation: int = 1,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on one global batch.

    The loss is the sum over the batch's valid utterances divided by their number, over all devices and micro-batches.
    A step with a non-finite loss or gradient leaves parameters and optimizer as they were.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    count = jnp.maximum(batch["valid"].sum(), 1)

    def loss_sum(params: PyTree, rows: dict[str, Array], index: Int[Array, ""]):
        streams = jax.random.split(jax.random.fold_in(key, index), len(RANDOM_STREAMS))
        rngs = dict(zip(RANDOM_STREAMS, streams, strict=True))
        results = task.results(params, rows, deterministic=False, rngs=rngs)
        return results.losses.sum() / count, results.infeasible.sum()

    def accumulate(carry: PyTree, micro: tuple[dict[str, Array], Int[Array, ""]]):
        (loss, infeasible), gradients = jax.value_and_grad(loss_sum, has_aux=True)(state.params, *micro)
        return jax.tree.map(jnp.add, carry, (gradients, loss, infeasible)), None

    if accumulation == 1:
        (loss, infeasible), gradients = jax.value_and_grad(loss_sum, has_aux=True)(state.params, batch, jnp.int32(0))
    else:
        zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0), jnp.int32(0))
        micro = (_micro_batches(batch, accumulation), jnp.arange(accumulation))
        (gradients, loss, infeasible), _ = jax.lax.scan(accumulate, zeros, micro)

    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, moved = optimizer.update(gradients, state.optimizer, state.params)
    keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    skipped = (~finite).astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=keep(optax.apply_updates(state.params, updates), state.params),
        optimizer=keep(moved, state.optimizer),
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
    )
    samples = jnp.where(batch["valid"], batch["sample_lengths"], 0).sum(dtype=jnp.float32)
    metrics = StepMetrics(loss, norm, batch["valid"].sum(), infeasible, samples, state.skipped, state.skipped_in_a_row)
    return state, metrics


def evaluation_step(params: PyTree, batch: dict[str, Array], *, task: Task) -> RowResults:
    """Losses and predictions without dropout or masking."""
    return task.results(params, batch, deterministic=True)
