"""The feature extractor of Wav2Vec2-BERT, with the interface and the file of Transformers."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from speech_flax.audio.features import BatchFeature, FeatureExtractor, as_arrays
from speech_flax.audio.log_mel import log_mel, num_log_mel_frames

#: Waveforms are padded to a multiple of this for the computation, so that few shapes are compiled (samples).
_ROUNDING = 16_000

logger = logging.getLogger(__name__)


class SeamlessM4TFeatureExtractor(FeatureExtractor):
    """Waveforms to stacked, normalised log-mel frames (:func:`~speech_flax.audio.log_mel.log_mel`).

    Args:
        feature_size: Mel filters; the same as ``num_mel_bins``.
        sampling_rate: Samples per second; 16000 alone is supported.
        num_mel_bins: Mel filters.
        padding_value: What fills features past the end.
        stride: Frames of 10 ms stacked into one vector.

    Raises:
        ValueError: for another sampling rate.
    """

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 80,
        padding_value: float | int = 0.0,
        stride: int = 2,
        **additional: Any,
    ):
        if sampling_rate != 16_000:
            raise ValueError(f"the log-mel front end works at 16000 Hz, not at {sampling_rate}")
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.num_mel_bins = num_mel_bins
        self.padding_value = float(padding_value)
        self.stride = stride
        self.additional = additional

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str = True,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = "np",
        sampling_rate: int | None = None,
        return_attention_mask: bool = True,
    ) -> BatchFeature:
        """``input_features`` ``[batch, frames, stride * num_mel_bins]`` and ``attention_mask`` ``[batch, frames]``.

        Args:
            raw_speech: One waveform, or several: a list, or an array ``[batch, samples]``. Of multichannel audio
                (``[channels, samples]`` in a list, or ``[batch, channels, samples]``) the first channel is used.
            padding: To the longest, to ``max_length`` frames (``"max_length"``), or not at all (``False``).
            pad_to_multiple_of: Rounds up the number of frames of 10 ms; default: ``stride``, which always holds.
            max_length: Frames of 10 ms to pad or, with ``truncation``, to cut to.
            truncation: Cut to ``max_length``.
            return_tensors: ``"np"``, ``"jax"``, or ``None`` for a list of arrays.
            sampling_rate: Rate of the waveforms, to be checked.
            return_attention_mask: Whether to return the mask.

        Raises:
            ValueError: for another sampling rate, or waveforms of unequal length without padding into one array.
        """
        if sampling_rate is None:
            logger.warning("sampling_rate was not given: waveforms are taken to be at %d Hz", self.sampling_rate)
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the model was trained at {self.sampling_rate} Hz, but the audio has {sampling_rate} Hz; resample it"
            )
        extracted = [self._extract(waveform) for waveform in _waveforms(raw_speech)]
        if truncation and max_length is not None:
            cut = max_length // self.stride
            extracted = [(features[:cut], mask[:cut]) for features, mask in extracted]
        if padding and padding != "do_not_pad":
            extracted = self._padded(extracted, padding, max_length, pad_to_multiple_of)
        features, masks = [one for one, _ in extracted], [one for _, one in extracted]
        output = BatchFeature(input_features=features)
        if return_attention_mask:
            output["attention_mask"] = masks
        return output if return_tensors is None else as_arrays(output, return_tensors)

    def pad(
        self, features: Sequence[dict[str, Any]] | dict[str, Any], return_tensors: str | None = "np", **_: Any
    ) -> BatchFeature:
        """Pad extracted ``input_features`` (and their masks; all ones if they have none) to the longest."""
        if isinstance(features, dict):
            masks = features.get("attention_mask") or [None] * len(features["input_features"])
            features = [
                {"input_features": one, "attention_mask": mask}
                for one, mask in zip(features["input_features"], masks, strict=True)
            ]
        pairs = []
        for item in features:
            vectors = np.asarray(item["input_features"], np.float32)
            mask = item.get("attention_mask")
            pairs.append((vectors, np.ones(len(vectors), np.int32) if mask is None else np.asarray(mask, np.int32)))
        padded = self._padded(pairs, True, None, None)
        output = BatchFeature(
            input_features=[vectors for vectors, _ in padded], attention_mask=[mask for _, mask in padded]
        )
        return output if return_tensors is None else as_arrays(output, return_tensors)

    def _extract(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of one waveform, and their mask; the last vector may be filled in part and masked."""
        samples = len(waveform)
        frames = num_log_mel_frames(samples)
        vectors = -(-frames // self.stride)
        if vectors == 0:
            return np.zeros((0, self.stride * self.num_mel_bins), np.float32), np.zeros(0, np.int32)
        padded = np.zeros((1, -(-samples // _ROUNDING) * _ROUNDING), np.float32)
        padded[0, :samples] = waveform
        features, mask = log_mel(
            padded,
            np.array([samples]),
            num_mel_bins=self.num_mel_bins,
            stride=self.stride,
            padding_value=self.padding_value,
        )
        return np.asarray(features)[0, :vectors], np.asarray(mask)[0, :vectors].astype(np.int32)

    def _padded(
        self,
        pairs: list[tuple[np.ndarray, np.ndarray]],
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        length = max((len(features) for features, _ in pairs), default=0)
        if padding == "max_length" and max_length is not None:
            length = max(length, -(-max_length // self.stride))
        if multiple:
            length = -(-length * self.stride // multiple) * multiple // self.stride
        return [
            (
                np.pad(features, ((0, length - len(features)), (0, 0)), constant_values=self.padding_value),
                np.pad(mask, (0, length - len(mask))),
            )
            for features, mask in pairs
        ]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``preprocessor_config.json``."""
        return {
            "padding_side": "right",
            "return_attention_mask": True,
            **self.additional,
            "feature_extractor_type": "SeamlessM4TFeatureExtractor",
            "feature_size": self.feature_size,
            "num_mel_bins": self.num_mel_bins,
            "padding_value": self.padding_value,
            "processor_class": "Wav2Vec2BertProcessor",
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
