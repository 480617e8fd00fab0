"""The feature extractor of HuBERT, with the interface and the file of Transformers: the waveform itself, normalised."""

from typing import Any, ClassVar

import numpy as np

from speech_flax.audio.features import BatchFeature, FeatureExtractor, as_arrays, extended

#: Added to the variance, so that silence stays finite.
_EPSILON = 1e-7


class Wav2Vec2FeatureExtractor(FeatureExtractor):
    """Waveforms to zero mean and unit variance, padded to one length.

    As in the reference, statistics are taken over the padding too when there is no attention mask: with
    ``return_attention_mask=False`` a padded waveform is scaled by other numbers than alone, and its padding is not
    zero. Models with group norm (HuBERT base) were made to be used like that.

    Args:
        feature_size: Values per sample; 1 alone makes sense.
        sampling_rate: Samples per second.
        padding_value: What fills waveforms past the end.
        return_attention_mask: Whether to return which samples count, unless the call says otherwise.
        do_normalize: Whether to normalise.

    Raises:
        ValueError: for padding on the left.
    """

    input_name: ClassVar[str] = "input_values"

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16_000,
        padding_value: float | int = 0.0,
        return_attention_mask: bool = False,
        do_normalize: bool = True,
        **additional: Any,
    ):
        if additional.get("padding_side", "right") != "right":
            raise ValueError(f"padding_side must be 'right', not {additional['padding_side']!r}")
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.padding_value = float(padding_value)
        self.return_attention_mask = return_attention_mask
        self.do_normalize = do_normalize
        self.additional = additional

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """``input_values`` ``[batch, samples]`` and, if wanted, ``attention_mask`` ``[batch, samples]``.

        Args:
            raw_speech: One waveform, or several: a list, or an array ``[batch, samples]``.
            padding: To the longest (``True`` or ``"longest"``), to ``max_length`` samples (``"max_length"``), or not at
                all (``False`` or ``"do_not_pad"``).
            max_length: Samples to pad or, with ``truncation``, to cut to.
            truncation: Cut to ``max_length``.
            pad_to_multiple_of: Rounds up the padded length, and ``max_length``.
            return_attention_mask: Whether to return the mask; default: as the extractor was made.
            return_tensors: ``"np"``, ``"jax"``, or ``None`` for a list of arrays.
            sampling_rate: Rate of the waveforms, to be checked.

        Raises:
            ValueError: for another sampling rate, several channels, a missing ``max_length``, or waveforms of unequal
                length without padding into one array.
        """
        self._check_rate(sampling_rate)
        waveforms = [{"input_values": waveform} for waveform in _mono_waveforms(raw_speech)]
        output = self.pad(
            waveforms,
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=None,
        )
        if self.do_normalize:
            masks = output.get("attention_mask", [None] * len(waveforms))
            pairs = zip(output["input_values"], masks, strict=True)
            output["input_values"] = [self._normalized(waveform, mask) for waveform, mask in pairs]
        return output if return_tensors is None else as_arrays(output, return_tensors)

    def _normalized(self, waveform: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Zero mean and unit variance of the samples that count, on the left; the others become the padding value."""
        length = len(waveform) if mask is None else int(mask.sum())
        if length == 0:
            return waveform
        speech = waveform[:length]
        normalized = (speech - speech.mean()) / np.sqrt(speech.var() + np.float32(_EPSILON))
        return extended(normalized, len(waveform), self.padding_value)

    def to_dict(self) -> dict[str, Any]:
        return {
            "padding_side": "right",
            "processor_class": "Wav2Vec2Processor",
            **self.additional,
            "do_normalize": self.do_normalize,
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": self.feature_size,
            "padding_value": self.padding_value,
            "return_attention_mask": self.return_attention_mask,
            "sampling_rate": self.sampling_rate,
        }


def _mono_waveforms(raw_speech: Any) -> list[np.ndarray]:
    """One float32 waveform per utterance."""
    if isinstance(raw_speech, list | tuple) and len(raw_speech) and np.ndim(raw_speech[0]) > 0:
        waveforms = [np.asarray(one, np.float32) for one in raw_speech]
    else:
        array = np.asarray(raw_speech, np.float32)
        waveforms = [array] if array.ndim == 1 else list(array)
    if any(waveform.ndim != 1 for waveform in waveforms):
        raise ValueError(
            "the audio has several channels; HuBERT reads one: pass waveforms [samples] or [batch, samples]"
        )
    return waveforms
