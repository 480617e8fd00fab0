"""From waveforms to what a model takes, on the device and inside the step."""

import dataclasses
from functools import partial

from jaxtyping import Array, Bool, Float, Int

from speech_flax.audio.feature_extraction import SeamlessM4TFeatureExtractor
from speech_flax.audio.log_mel import log_mel
from speech_flax.layers.sharding import map_rows


@dataclasses.dataclass(frozen=True)
class LogMelFrontEnd:
    """Stacked, normalised log-mel frames for Wav2Vec2-BERT; ``padding_value`` fills features past the end."""

    num_mel_bins: int = 80
    stride: int = 2
    padding_value: float = 0.0

    @classmethod
    def of(cls, extractor: SeamlessM4TFeatureExtractor) -> "LogMelFrontEnd":
        """The front end that computes what ``extractor`` does."""
        return cls(extractor.num_mel_bins, extractor.stride, extractor.padding_value)

    def __call__(
        self, waveforms: Float[Array, "batch samples"], sample_lengths: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch frames features"], Bool[Array, "batch frames"]]:
        """Features, and which of their frames are audio."""
        settings = dataclasses.asdict(self)
        return map_rows(partial(log_mel, **settings), waveforms, sample_lengths)
