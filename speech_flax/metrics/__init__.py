"""How good predictions are: of transcripts, classes, values, frames and speakers."""

from speech_flax.metrics.classification import FrameCounts, accuracy, macro_f1
from speech_flax.metrics.regression import mean_absolute_error, mean_squared_error, pearson_correlation
from speech_flax.metrics.transcription import ErrorRate, character_error_rate, word_error_rate
from speech_flax.metrics.verification import equal_error_rate, pair_scores, trial_scores

__all__ = [
    "ErrorRate",
    "FrameCounts",
    "accuracy",
    "character_error_rate",
    "equal_error_rate",
    "macro_f1",
    "mean_absolute_error",
    "mean_squared_error",
    "pair_scores",
    "pearson_correlation",
    "trial_scores",
    "word_error_rate",
]
