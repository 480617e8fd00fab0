"""Processors: a feature extractor and a tokenizer in one, as Transformers names them."""

from pathlib import Path
from typing import Any, ClassVar

from speech_flax.audio.feature_extraction import SeamlessM4TFeatureExtractor
from speech_flax.audio.features import BatchFeature, FeatureExtractor
from speech_flax.audio.waveform_extraction import Wav2Vec2FeatureExtractor
from speech_flax.text.decoding import Wav2Vec2CTCTokenizerOutput
from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer


class Processor:
    """Audio to features, text to labels, and frame-wise ids back to text.

    Args:
        feature_extractor: For audio.
        tokenizer: For text.
    """

    feature_extractor_class: ClassVar[type[FeatureExtractor]]

    def __init__(self, feature_extractor: FeatureExtractor, tokenizer: Wav2Vec2CTCTokenizer):
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer

    def __call__(
        self, audio: Any = None, text: Any = None, *, return_tensors: str | None = None, **options: Any
    ) -> BatchFeature | dict[str, Any]:
        """Features of ``audio``, ids of ``text``, or features with ``labels`` when both are given.

        Args:
            audio: See the feature extractor.
            text: One text or several.
            return_tensors: ``"np"``, ``"jax"``, or ``None`` for lists.
            options: For the feature extractor (``sampling_rate``, ``padding``, ``max_length``, ...) and the tokenizer,
                which gets all of them but ``sampling_rate``.

        Raises:
            TypeError: for an option that one of them does not know.
            ValueError: when neither is given.
        """
        if audio is None and text is None:
            raise ValueError("a processor needs audio, text or both")
        encoded = None
        if text is not None:
            of_text = {name: value for name, value in options.items() if name != "sampling_rate"}
            encoded = self.tokenizer(text, return_tensors=return_tensors, **of_text)
            if audio is None:
                return encoded
        features = self.feature_extractor(audio, return_tensors=return_tensors, **options)
        if encoded is not None:
            features["labels"] = encoded["input_ids"]
        return features

    def pad(
        self, input_features: Any = None, labels: Any = None, *, return_tensors: str | None = None, **options: Any
    ) -> BatchFeature | dict[str, Any]:
        """Pad extracted features, or labels, or both; labels are padded with the padding token.

        Args:
            input_features: See :meth:`pad` of the feature extractor.
            labels: See :meth:`Wav2Vec2CTCTokenizer.pad`.
            return_tensors: ``"np"``, ``"jax"``, or ``None`` for lists.
            options: For both (``padding``, ``max_length``, ``pad_to_multiple_of``, ...).

        Raises:
            TypeError: for an option that one of them does not know.
            ValueError: when neither is given.
        """
        if input_features is None and labels is None:
            raise ValueError("a processor needs input_features, labels or both to pad")
        padded_labels = None
        if labels is not None:
            padded_labels = self.tokenizer.pad(labels, return_tensors=return_tensors, **options)
            if input_features is None:
                return padded_labels
        features = self.feature_extractor.pad(input_features, return_tensors=return_tensors, **options)
        if padded_labels is not None:
            features["labels"] = padded_labels["input_ids"]
        return features

    def decode(self, token_ids: Any, **options: Any) -> str | Wav2Vec2CTCTokenizerOutput:
        """:meth:`Wav2Vec2CTCTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, **options)

    def batch_decode(self, sequences: Any, **options: Any) -> list[str] | Wav2Vec2CTCTokenizerOutput:
        """:meth:`Wav2Vec2CTCTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(sequences, **options)

    @classmethod
    def from_pretrained(cls, directory_or_hub_id: str | Path) -> "Processor":
        """The processor in a directory or on the hub.

        Raises:
            FileNotFoundError: when a file is missing.
        """
        return cls(
            cls.feature_extractor_class.from_pretrained(directory_or_hub_id),
            Wav2Vec2CTCTokenizer.from_pretrained(directory_or_hub_id),
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files of both, as Transformers reads them."""
        self.feature_extractor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory, processor_class=type(self).__name__)


class Wav2Vec2BertProcessor(Processor):
    """The processor of Wav2Vec2-BERT; see :class:`~speech_flax.SeamlessM4TFeatureExtractor`."""

    feature_extractor_class = SeamlessM4TFeatureExtractor


class Wav2Vec2Processor(Processor):
    """The processor of HuBERT; see :class:`~speech_flax.Wav2Vec2FeatureExtractor`."""

    feature_extractor_class = Wav2Vec2FeatureExtractor
