"""One training step and one evaluation step: pure functions of state and batch, jitted over a mesh.

On the device: front end, SpecAugment, model, loss, gradients, clipping, AdamW. What is random in a step depends on the
experiment's seed and the step's number alone.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from speech_flax.training.optimizer import Optimizer
from speech_flax.training.task import RowResults, Task

RANDOM_STREAMS = ("dropout", "spec_augment", "layer_drop")
#: Steps before a spike can be told from the noise of the first ones.
_STEPS_BEFORE_SPIKES = 50
_AVERAGED_STEPS = 100


@flax.struct.dataclass
class TrainState:
    """Everything that changes in training, and all that a checkpoint holds.

    ``step`` counts batches, skipped ones included; ``skipped`` counts those whose loss or gradient was not finite or a
    spike, and ``skipped_in_a_row`` the last uninterrupted run of them. ``average_loss`` and ``average_norm`` follow the
    loss and the gradient norm of the ``averaged`` last steps that were not skipped; they begin anew when the base model
    joins the head. All but ``params`` and ``optimizer`` are scalars; shapes, shardings and checksums come in trees of
    this type, too.
    """

    step: PyTree
    params: PyTree
    optimizer: PyTree
    skipped: PyTree
    skipped_in_a_row: PyTree
    averaged: PyTree
    average_loss: PyTree
    average_norm: PyTree

    @classmethod
    def create(cls, params: PyTree, optimizer: Optimizer) -> "TrainState":
        count, average = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return cls(count, params, optimizer.init(params), count, count, count, average, average)


@flax.struct.dataclass
class StepMetrics:
    """Scalars of the global batch, on the device or fetched from it.

    ``loss`` is per utterance, as it is differentiated; ``learning_rate`` is that of the base model; ``utterances``,
    ``infeasible`` ones among them and ``audio_samples`` are counts; ``skipped`` and ``skipped_in_a_row`` are those of
    the state after the step.
    """

    loss: PyTree
    gradient_norm: PyTree
    learning_rate: PyTree
    utterances: PyTree
    infeasible: PyTree
    audio_samples: PyTree
    skipped: PyTree
    skipped_in_a_row: PyTree


def _micro_batches(batch: dict[str, Array], accumulation: int) -> dict[str, Array]:
    """Every ``accumulation``-th row to the same micro-batch, so that rows stay on their devices."""

    def split(rows: Array) -> Array:
        return rows.reshape(rows.shape[0] // accumulation, accumulation, *rows.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _is_spike(state: TrainState, loss: Array, norm: Array, factor: float) -> Array:
    if not factor:
        return jnp.bool_(False)
    usual_loss, usual_norm = (jnp.maximum(1.0, average) for average in (state.average_loss, state.average_norm))
    return ((loss > factor * usual_loss) | (norm > factor * usual_norm)) & (state.averaged >= _STEPS_BEFORE_SPIKES)


def _loss_and_gradients(
    params: PyTree, batch: dict[str, Array], task: Task, held: PyTree, key: Array, accumulation: int
) -> tuple[Array, Array, PyTree]:
    """Loss per utterance, infeasible utterances, and gradients but of what is ``held``, of all micro-batches."""
    count = jnp.maximum(batch["valid"].sum(), 1)

    def loss_sum(params: PyTree, rows: dict[str, Array], index: Int[Array, ""]):
        streams = jax.random.split(jax.random.fold_in(key, index), len(RANDOM_STREAMS))
        rngs = {**dict(zip(RANDOM_STREAMS, streams, strict=True)), "layer_drop": key}  # one draw for all micro-batches
        params = jax.tree.map(lambda leaf, keep: jax.lax.stop_gradient(leaf) if keep else leaf, params, held)
        results = task.results(params, rows, deterministic=False, rngs=rngs)
        return results.losses.sum() / count, results.infeasible.sum()

    def of_rows(rows: dict[str, Array], index: Int[Array, ""]) -> tuple[Array, Array, PyTree]:
        (loss, infeasible), gradients = jax.value_and_grad(loss_sum, has_aux=True)(params, rows, index)
        return loss, infeasible, gradients

    if accumulation == 1:
        return of_rows(batch, jnp.int32(0))
    zeros = (jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, params))
    micro = (_micro_batches(batch, accumulation), jnp.arange(accumulation))
    return jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, of_rows(*one)), None), zeros, micro)[0]


def _next_state(
    state: TrainState, taken: Array, params: PyTree, optimizer: PyTree, loss: Array, norm: Array
) -> TrainState:
    """The state after a step to ``params`` and ``optimizer``, or after one that was skipped unless ``taken``."""
    keep = partial(jax.tree.map, lambda new, old: jnp.where(taken, new, old))
    skipped = (~taken).astype(jnp.int32)
    averaged = jnp.minimum(state.averaged + 1, _AVERAGED_STEPS)
    return TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        optimizer=keep(optimizer, state.optimizer),
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        averaged=keep(averaged, state.averaged),
        average_loss=keep(state.average_loss + (loss - state.average_loss) / averaged, state.average_loss),
        average_norm=keep(state.average_norm + (norm - state.average_norm) / averaged, state.average_norm),
    )


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    task: Task,
    optimizer: Optimizer,
    seed: int,
    accumulation: int = 1,
    spike_factor: float = 0.0,
    head_only: bool = False,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on one global batch.

    The loss is the sum over the batch's valid utterances divided by their number, over all devices and micro-batches.
    A step whose loss or gradient is not finite, or ``spike_factor`` times its running average (at least 1), leaves
    parameters and optimizer as they were. With ``head_only`` the base model is not trained, nor its gradient computed.
    """
    if optimizer.settings.head_only_steps and not head_only:  # gradients of the head alone say nothing of the whole
        joined = state.step == optimizer.settings.head_only_steps
        state = state.replace(averaged=jnp.where(joined, 0, state.averaged))
    held = optimizer.held(state.params, head_only=head_only)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    loss, infeasible, gradients = _loss_and_gradients(state.params, batch, task, held, key, accumulation)
    norm = optax.tree.norm(gradients)
    taken = jnp.isfinite(loss) & jnp.isfinite(norm) & ~_is_spike(state, loss, norm, spike_factor)
    rate = optimizer.learning_rate(state.step - state.skipped)
    updates, moved = optimizer.update(gradients, state.optimizer, state.params, head_only=head_only)
    state = _next_state(state, taken, optax.apply_updates(state.params, updates), moved, loss, norm)
    samples = jnp.where(batch["valid"], batch["sample_lengths"], 0).sum(dtype=jnp.float32)
    metrics = StepMetrics(
        loss=loss,
        gradient_norm=norm,
        learning_rate=rate,
        utterances=batch["valid"].sum(),
        infeasible=infeasible,
        audio_samples=samples,
        skipped=state.skipped,
        skipped_in_a_row=state.skipped_in_a_row,
    )
    return state, metrics


def evaluation_step(params: PyTree, batch: dict[str, Array], *, task: Task) -> RowResults:
    """Losses and predictions without dropout or masking."""
    return task.results(params, batch, deterministic=True)
