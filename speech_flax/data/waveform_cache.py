"""Decoded audio kept in memory between epochs."""

import threading

import numpy as np
from jaxtyping import Float32

_INT16_SCALE = np.float32(32768.0)


class WaveformCache:
    """Keeps waveforms, bit for bit, until ``max_bytes`` are used.

    Nothing is ever evicted: every epoch visits every utterance once, in a new order, so that what is in memory when
    the cache is full is as likely to be needed next as anything else, and the share of hits equals the share of the
    corpus that fits. Waveforms that came from 16-bit files at the model's rate are kept as 16-bit integers, others as
    they are. Safe to use from several threads; pickled, it arrives empty.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._free = max_bytes
        self._waveforms: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waveforms)

    def __reduce__(self) -> tuple:
        return WaveformCache, (self._max_bytes,)

    def get(self, index: int) -> Float32[np.ndarray, "samples"] | None:
        """The waveform of utterance ``index``, if it is kept."""
        kept = self._waveforms.get(index)
        if kept is None or kept.dtype == np.float32:
            return kept
        return kept.astype(np.float32) / _INT16_SCALE

    def put(self, index: int, waveform: Float32[np.ndarray, "samples"]) -> None:
        """Keep a waveform, if there is room."""
        if self._free <= 0 or index in self._waveforms:
            return
        kept = _without_loss(waveform)
        with self._lock:
            if index not in self._waveforms and kept.nbytes <= self._free:
                self._free -= kept.nbytes
                self._waveforms[index] = kept


def _without_loss(waveform: np.ndarray) -> np.ndarray:
    """As 16-bit integers where these give back the same floats; else an own copy, not a view of something larger."""
    scaled = waveform * _INT16_SCALE
    if waveform.size and (np.abs(scaled).max() > 32767 or not np.array_equal(scaled, np.rint(scaled))):
        return waveform.copy()
    return scaled.astype(np.int16)
