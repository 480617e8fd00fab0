"""Connectionist temporal classification (Graves et al. 2006), in float32, with its analytic gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels.platforms import for_platform

#: Logarithm of zero. Finite, so that differences of two of them are no NaN.
_NOTHING = -1e30


def ctc_loss(
    logits: Float[Array, "batch frames vocabulary"],
    logit_lengths: Int[Array, "batch"],
    labels: Int[Array, "batch labels"],
    label_lengths: Int[Array, "batch"],
    *,
    blank_id: int = 0,
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Negative log likelihood of ``labels`` given ``logits``, summed over all alignments, for every utterance.

    Args:
      logits: Scores before the softmax, finite; frames from ``logit_lengths`` on do not count and get gradient 0.
      logit_lengths: Frames of each utterance, at most ``frames``.
      labels: Right-padded label ids; entries from ``label_lengths`` on are ignored.
      label_lengths: Labels of each utterance; 0 is allowed.
      blank_id: Id of the blank symbol.

    Returns:
      The losses, and which utterances are feasible: those with at least one frame per label and one more between two
      equal neighbours. An infeasible utterance has loss ``inf`` and gradient 0; one with a label beyond the vocabulary
      has loss ``nan``.

    Raises:
      ValueError: the blank is no symbol of the vocabulary.
    """
    vocabulary = logits.shape[-1]
    if not 0 <= blank_id < vocabulary:
        raise ValueError(f"the blank (pad_token_id) is {blank_id}, which is no symbol of a vocabulary of {vocabulary}")
    # Padding may hold any id, -100 say; a score looked up there would be NaN.
    labels = jnp.where(jnp.arange(labels.shape[1]) < label_lengths[:, None], labels, 0)
    known = ((labels >= 0) & (labels < vocabulary)).all(-1)
    feasible = _feasible(logit_lengths, labels, label_lengths)
    losses = _ctc(logits.astype(jnp.float32), logit_lengths, labels, label_lengths, blank_id)
    return jnp.where(known, jnp.where(feasible, losses, jnp.inf), jnp.nan), feasible


def compact_labels(
    labels: Int[Array, "batch labels"], keep: Bool[Array, "batch labels"] | None = None
) -> tuple[Int[Array, "batch labels"], Int[Array, "batch"]]:
    """Move the labels to keep (default: all that are not negative) to the left, in order; the rest become 0.

    Returns:
      The compacted labels and how many each row has.
    """
    keep = labels >= 0 if keep is None else keep
    order = jnp.argsort(~keep, axis=-1, stable=True)
    lengths = keep.sum(-1).astype(jnp.int32)
    kept = jnp.arange(labels.shape[-1]) < lengths[:, None]
    return jnp.where(kept, jnp.take_along_axis(labels, order, axis=-1), 0), lengths


def reduce_ctc(
    losses: Float[Array, "batch"],
    feasible: Bool[Array, "batch"],
    label_lengths: Int[Array, "batch"],
    *,
    reduction: str,
    zero_infinity: bool,
) -> Float[Array, ""] | Float[Array, "batch"]:
    """Reduce as ``torch.nn.functional.ctc_loss`` does.

    ``"mean"`` divides each loss by its number of labels (at least 1) and averages over all utterances, infeasible ones
    included; ``"sum"`` adds; ``"none"`` returns one loss per utterance. ``zero_infinity`` makes infinite losses 0.

    Raises:
      ValueError: an unknown reduction.
    """
    if zero_infinity:
        losses = jnp.where(feasible, losses, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return (losses / jnp.maximum(label_lengths, 1)).mean()
    raise ValueError(f"ctc_loss_reduction must be 'sum', 'mean' or 'none', not {reduction!r}")


def _feasible(logit_lengths: Array, labels: Array, label_lengths: Array) -> Array:
    inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
    repeats = ((labels[:, 1:] == labels[:, :-1]) & inside).sum(-1)
    return logit_lengths >= label_lengths + repeats


def _log_sum(*terms: Array) -> Array:
    largest = functools.reduce(jnp.maximum, terms)
    return largest + jnp.log(sum(jnp.exp(term - largest) for term in terms))


def _shift_right(scores: Array) -> Array:
    return jnp.pad(scores, ((0, 0), (1, 0)), constant_values=_NOTHING)[:, :-1]


def _shift_left(scores: Array) -> Array:
    return jnp.pad(scores, ((0, 0), (0, 1)), constant_values=_NOTHING)[:, 1:]


def _emissions(log_probs: Array, labels: Array, blank_id: int) -> tuple[Array, Array]:
    """Log probabilities of each label, and of the blank, by frame: ``[frames, batch, labels]``, ``[frames, batch, 1]``.

    A one-hot product where matrix units make it cheap, a gather on the CPU; both are exact.
    """

    def gathered(log_probs: Array, labels: Array) -> Array:
        return jnp.take_along_axis(
            log_probs, jnp.broadcast_to(labels[:, None], (*log_probs.shape[:2], labels.shape[1])), 2
        )

    def product(log_probs: Array, labels: Array) -> Array:
        one_hot = jax.nn.one_hot(labels, log_probs.shape[-1], dtype=jnp.float32)
        return jnp.einsum("btv,bsv->bts", log_probs, one_hot, precision=lax.Precision.HIGHEST)

    of_labels = for_platform(log_probs, labels, cpu=gathered, default=product)
    return of_labels.swapaxes(0, 1), log_probs[:, :, blank_id, None].swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ctc(logits: Array, logit_lengths: Array, labels: Array, label_lengths: Array, blank_id: int) -> Array:
    return _forward(logits, logit_lengths, labels, label_lengths, blank_id)[0]


def _may_follow(labels: Array) -> Array:
    """Whether label u may directly follow label u - 1, without a blank between them: they differ."""
    return labels != jnp.pad(labels, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]


def _forward(
    logits: Array, logit_lengths: Array, labels: Array, label_lengths: Array, blank_id: int
) -> tuple[Array, tuple[Array, ...]]:
    """The forward variables: of label u, and of the blank before label u (one more at the end).

    Every frame's are divided by their largest, as hidden Markov models are scaled (Rabiner 1989, section V.A): the
    logarithms stay small, and a gradient over 1500 frames is a hundred times more precise than without.
    """
    batch, frames, _ = logits.shape
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    label_scores, blank_scores = _emissions(log_probs, labels, blank_id)
    follows = _may_follow(labels)

    def advance(alphas: tuple[Array, Array], frame: tuple[Array, Array, Array]):
        of_label, of_blank = alphas
        index, label_score, blank_score = frame
        skipped = jnp.where(follows, _shift_right(of_label), _NOTHING)
        new_label = _log_sum(of_label, of_blank[:, :-1], skipped) + label_score
        arrived = jnp.pad(of_label, ((0, 0), (1, 0)), constant_values=_NOTHING)
        new_blank = _log_sum(of_blank, arrived) + blank_score
        inside = (index < logit_lengths)[:, None]
        level = jnp.maximum(new_label.max(-1, initial=_NOTHING), new_blank.max(-1))[:, None]
        alphas = jnp.where(inside, new_label - level, of_label), jnp.where(inside, new_blank - level, of_blank)
        return alphas, (*alphas, jnp.where(inside, level, 0.0))

    nothing = jnp.full(labels.shape, _NOTHING)
    start = jnp.full((batch, labels.shape[1] + 1), _NOTHING).at[:, 0].set(0.0)
    indices = jnp.arange(frames)
    (of_label, of_blank), (*alphas, levels) = lax.scan(advance, (nothing, start), (indices, label_scores, blank_scores))
    at_blank = jnp.take_along_axis(of_blank, label_lengths[:, None], axis=1)[:, 0]
    padded = jnp.pad(of_label, ((0, 0), (1, 0)), constant_values=_NOTHING)
    at_label = jnp.take_along_axis(padded, label_lengths[:, None], axis=1)[:, 0]
    at_end = _log_sum(at_blank, at_label)
    residuals = (log_probs, logit_lengths, labels, label_lengths, at_end, *alphas, levels)
    return -(at_end + levels.sum(0)[:, 0]), residuals


def _backward(blank_id: int, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array | np.ndarray, ...]:
    """Softmax minus the posterior of each symbol, from the backward variables, scaled like the forward ones."""
    log_probs, logit_lengths, labels, label_lengths, at_end, label_alphas, blank_alphas, levels = residuals
    frames, vocabulary = log_probs.shape[1:]
    label_scores, blank_scores = _emissions(log_probs, labels, blank_id)
    next_follows = jnp.pad(_may_follow(labels), ((0, 0), (0, 1)))[:, 1:]
    positions = jnp.arange(labels.shape[1] + 1)
    end_blank = jnp.where(positions == label_lengths[:, None], 0.0, _NOTHING)
    end_label = jnp.where(positions[:-1] == label_lengths[:, None] - 1, 0.0, _NOTHING)

    def retreat(scored_betas: tuple[Array, Array], frame: tuple[Array, ...]):
        next_label, next_blank = scored_betas  # with the emission of the frame they belong to
        index, label_score, blank_score, label_alpha, blank_alpha, level = frame
        skipped = jnp.where(next_follows, _shift_left(next_label), _NOTHING)
        of_label = _log_sum(next_label, next_blank[:, 1:], skipped)
        left = jnp.pad(next_label, ((0, 0), (0, 1)), constant_values=_NOTHING)
        of_blank = _log_sum(next_blank, left)
        last = (index >= logit_lengths - 1)[:, None]
        of_label, of_blank = jnp.where(last, end_label, of_label), jnp.where(last, end_blank, of_blank)
        posterior = jnp.exp(label_alpha + of_label - at_end[:, None])
        blank_posterior = jnp.exp(blank_alpha + of_blank - at_end[:, None]).sum(-1)
        return (of_label + label_score - level, of_blank + blank_score - level), (posterior, blank_posterior)

    nothing = jnp.full(labels.shape, _NOTHING), jnp.full(end_blank.shape, _NOTHING)
    frame_inputs = (jnp.arange(frames), label_scores, blank_scores, label_alphas, blank_alphas, levels)
    _, (posteriors, blank_posteriors) = lax.scan(retreat, nothing, frame_inputs, reverse=True)

    one_hot = jax.nn.one_hot(labels, vocabulary, dtype=jnp.float32)
    of_symbols = jnp.einsum("tbs,bsv->btv", posteriors, one_hot, precision=lax.Precision.HIGHEST)
    of_symbols = of_symbols.at[:, :, blank_id].add(blank_posteriors.T)
    total = posteriors.sum(-1) + blank_posteriors  # 1 but for rounding, which a frame's symbols mostly share
    of_symbols = of_symbols / total.T[:, :, None]
    gradient = (jnp.exp(log_probs) - of_symbols) * cotangent[:, None, None]
    counts = (jnp.arange(frames) < logit_lengths[:, None]) & _feasible(logit_lengths, labels, label_lengths)[:, None]
    gradient = jnp.where(counts[:, :, None], gradient, 0.0)
    no_gradient = [np.zeros(ids.shape, jax.dtypes.float0) for ids in (logit_lengths, labels, label_lengths)]
    return gradient, *no_gradient


_ctc.defvjp(_forward, _backward)
