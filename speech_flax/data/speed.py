"""Speed perturbation: every utterance also faster and slower (Ko et al. 2015)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64

from speech_flax.data.sources import DataSource, Utterance, Utterances


class SpeedPerturbed(Sequence[Utterance]):
    """Every utterance once at each of ``factors``, resampled: a factor of 1.1 makes it 10 % shorter and raises pitch
    and formants by 10 %, as a smaller speaker has them.

    Utterances come factor by factor, so that a batch plan over them draws copies of all speeds into an epoch, and what
    is read stays a function of the index alone.

    Raises:
        ValueError: without factors, or when one is not positive.
    """

    def __init__(self, utterances: Utterances, factors: Sequence[float]):
        if not factors or min(factors) <= 0:
            raise ValueError(f"speed factors must be positive numbers, not {list(factors)}")
        self._utterances = utterances
        self._factors = tuple(factors)
        self._texts = list(utterances.texts()) * len(self._factors)
        marks = ["" if factor == 1 else f"@{factor:g}" for factor in self._factors]
        self._ids = [name + mark for mark in marks for name in utterances.ids()]

    @property
    def source(self) -> DataSource:
        """Where the utterances come from."""
        return self._utterances.source

    def __len__(self) -> int:
        return len(self._utterances) * len(self._factors)

    def _parts(self, index: int) -> tuple[int, float]:
        factor, original = divmod(index, len(self._utterances))
        return original, self._factors[factor]

    def __getitem__(self, index: int) -> Utterance:
        return self._utterances[self._parts(index)[0]]

    def texts(self) -> Sequence[str]:
        """Transcripts, once for each factor; not a copy."""
        return self._texts

    def ids(self) -> Sequence[str]:
        """Names; those of changed speed end in ``@`` and the factor. Not a copy."""
        return self._ids

    def durations(self) -> Float64[np.ndarray, "utterances"]:
        """Seconds of every utterance at its speed; 0 where one is unreadable."""
        seconds = self._utterances.durations()
        return np.concatenate([seconds / factor for factor in self._factors])

    def waveform(self, index: int) -> Float32[np.ndarray, "samples"]:
        """Decoded audio of one utterance at its speed.

        Raises:
            AudioError: when it cannot be decoded.
        """
        original, factor = self._parts(index)
        return change_speed(self._utterances.waveform(original), factor)


def change_speed(waveform: Float32[np.ndarray, "samples"], factor: float) -> Float32[np.ndarray, "resampled"]:
    """``waveform`` played ``factor`` times as fast."""
    if factor == 1:
        return waveform
    import soxr

    return soxr.resample(waveform, factor, 1.0, quality="HQ")
