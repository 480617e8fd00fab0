"""What the CTC models of both families share: which labels count, and the loss as the configuration wants it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from speech_flax.configuration import SpeechConfig
from speech_flax.losses import compact_labels, ctc_loss, reduce_ctc

Labels = Int[Array | np.ndarray, "batch labels"]


def counted_labels(labels: Labels, config: SpeechConfig) -> Bool[Array | np.ndarray, "batch labels"]:
    """``True`` for the labels that are to be recognised.

    Negative ones (-100 by custom) never are. The blank is none either, except in Transformers 4.37, which leaves it in:
    labels padded with ``pad_token_id`` give infinite or meaningless losses there.
    """
    counted = labels >= 0
    if config.compatibility != "transformers-4.37":
        counted &= labels != config.pad_token_id
    return counted


def loss_of_labels(
    logits: Float[Array, "batch frames vocabulary"],
    logit_lengths: Int[Array, "batch"],
    labels: Labels,
    config: SpeechConfig,
) -> tuple[Float[Array, ""] | Float[Array, "batch"], Int[Array, ""]]:
    """The CTC loss, reduced as ``ctc_loss_reduction`` and ``ctc_zero_infinity`` say, and the number of infeasible
    utterances: those with too few frames for their labels.

    Raises:
      ValueError: a label that is not below ``vocab_size`` (checked outside of ``jit`` alone).
    """
    if not isinstance(labels, jax.core.Tracer):
        highest = np.max(np.asarray(labels), initial=-1)  # JAX's maximum would be traced where a step is compiled
        if highest >= config.vocab_size:
            raise ValueError(f"labels must be below vocab_size {config.vocab_size}; one is {highest}")
    compact, label_lengths = compact_labels(jnp.asarray(labels), jnp.asarray(counted_labels(labels, config)))
    losses, feasible = ctc_loss(logits, logit_lengths, compact, label_lengths, blank_id=config.pad_token_id)
    loss = reduce_ctc(
        losses, feasible, label_lengths, reduction=config.ctc_loss_reduction, zero_infinity=config.ctc_zero_infinity
    )
    return loss, (~feasible).sum()
