"""What is minimised, in float32, with one value per utterance or frame before any reduction."""

from speech_flax.losses.classification import binary_cross_entropy, cross_entropy, mean_of_counted
from speech_flax.losses.ctc import compact_labels, ctc_loss, reduce_ctc
from speech_flax.losses.margin import additive_margin_softmax

__all__ = [
    "additive_margin_softmax",
    "binary_cross_entropy",
    "compact_labels",
    "cross_entropy",
    "ctc_loss",
    "mean_of_counted",
    "reduce_ctc",
]
