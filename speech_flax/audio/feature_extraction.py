"""The feature extractor of Wav2Vec2-BERT, with the interface and the file of Transformers."""

from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32

from speech_flax.audio.features import BatchFeature, FeatureExtractor, as_arrays
from speech_flax.audio.log_mel import log_mel, num_log_mel_frames

#: Waveforms are padded to a multiple of this for the computation, so that few shapes are compiled (samples).
_ROUNDING = 16_000


class SeamlessM4TFeatureExtractor(FeatureExtractor):
    """Waveforms to stacked, normalised log-mel frames (:func:`~speech_flax.audio.log_mel.log_mel`).

    Args:
        feature_size: Mel filters; the same as ``num_mel_bins``.
        sampling_rate: Samples per second; 16000 alone is supported.
        num_mel_bins: Mel filters.
        padding_value: What fills features past the end.
        stride: Frames of 10 ms stacked into one vector.
        return_attention_mask: Whether to return which vectors count, unless the call says otherwise.

    Raises:
        ValueError: for another sampling rate.
    """

    input_name: ClassVar[str] = "input_features"

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 80,
        padding_value: float | int = 0.0,
        stride: int = 2,
        return_attention_mask: bool = True,
        **additional: Any,
    ):
        if sampling_rate != 16_000:
            raise ValueError(f"the log-mel front end works at 16000 Hz, not at {sampling_rate}")
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.num_mel_bins = num_mel_bins
        self.padding_value = float(padding_value)
        self.stride = stride
        self.return_attention_mask = return_attention_mask
        self.additional = additional

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str = True,
        pad_to_multiple_of: int | None = 2,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = "np",
        sampling_rate: int | None = None,
        return_attention_mask: bool | None = None,
    ) -> BatchFeature:
        """``input_features`` ``[batch, frames, stride * num_mel_bins]`` and ``attention_mask`` ``[batch, frames]``.

        Args:
            raw_speech: One waveform, or several: a list, or an array ``[batch, samples]``. Of multichannel audio
                (``[channels, samples]`` in a list, or ``[batch, channels, samples]``) the first channel is used.
            padding: To the longest (``True`` or ``"longest"``), to ``max_length`` (``"max_length"``), or not at all
                (``False`` or ``"do_not_pad"``): then frames that fill no vector are left out.
            pad_to_multiple_of: Rounds up the padded number of frames of 10 ms, and ``max_length``.
            max_length: Frames of 10 ms to pad or, with ``truncation``, to cut to. (For :meth:`pad`: vectors.)
            truncation: Cut to ``max_length``.
            return_tensors: ``"np"``, ``"jax"``, or ``None`` for a list of arrays.
            sampling_rate: Rate of the waveforms, to be checked.
            return_attention_mask: Whether to return the mask; default: as the extractor was made.

        Raises:
            ValueError: for another sampling rate or ``padding``, a missing ``max_length``, or waveforms of unequal
                length without padding into one array.
        """
        self._check_rate(sampling_rate)
        frames = [{"input_features": self._frames(waveform)} for waveform in _waveforms(raw_speech)]
        padded = self.pad(
            frames,
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors=None,
        )
        output = BatchFeature(input_features=[self._stacked(features) for features in padded["input_features"]])
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            output["attention_mask"] = [mask[self.stride - 1 :: self.stride] for mask in padded["attention_mask"]]
        return output if return_tensors is None else as_arrays(output, return_tensors)

    def _frames(self, waveform: Float32[np.ndarray, "samples"]) -> Float32[np.ndarray, "frames mel_bins"]:
        """Log-mel frames of one waveform."""
        samples = len(waveform)
        frames = num_log_mel_frames(samples)
        if frames == 0:
            return np.zeros((0, self.num_mel_bins), np.float32)
        padded = np.zeros((1, -(-samples // _ROUNDING) * _ROUNDING), np.float32)
        padded[0, :samples] = waveform
        vectors, _ = log_mel(padded, np.array([samples]), num_mel_bins=self.num_mel_bins, stride=self.stride)
        return np.asarray(vectors).reshape(-1, self.num_mel_bins)[:frames]

    def _stacked(self, frames: Float32[np.ndarray, "frames mel_bins"]) -> Float32[np.ndarray, "vectors features"]:
        """As many whole vectors of ``stride`` frames as there are."""
        vectors = len(frames) // self.stride
        return frames[: vectors * self.stride].reshape(vectors, self.stride * self.num_mel_bins)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``preprocessor_config.json``."""
        return {
            "padding_side": "right",
            **self.additional,
            "feature_extractor_type": "SeamlessM4TFeatureExtractor",
            "feature_size": self.feature_size,
            "num_mel_bins": self.num_mel_bins,
            "padding_value": self.padding_value,
            "processor_class": "Wav2Vec2BertProcessor",
            "return_attention_mask": self.return_attention_mask,
            "sampling_rate": self.sampling_rate,
            "stride": self.stride,
        }


def _waveforms(raw_speech: Any) -> list[np.ndarray]:
    """One mono float32 waveform per utterance."""
    if isinstance(raw_speech, list | tuple) and len(raw_speech) and np.ndim(raw_speech[0]) > 0:
        waveforms = [np.asarray(one, np.float32) for one in raw_speech]
    else:
        array = np.asarray(raw_speech, np.float32)
        if array.ndim > 3:
            raise ValueError(f"audio has {array.ndim} axes; at most batch, channels and samples make sense")
        waveforms = [array] if array.ndim == 1 else list(array)
    return [waveform[0] if waveform.ndim > 1 else waveform for waveform in waveforms]
