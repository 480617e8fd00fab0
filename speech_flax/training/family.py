"""The model families: which classes belong together, and how their audio becomes frames."""

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

import speech_flax
from speech_flax.configuration import SpeechConfig
from speech_flax.layers.masks import adapter_output_lengths, labelled_frames
from speech_flax.pretrained import pretrained_directory
from speech_flax.training.experiment import Experiment, ExperimentError, FeatureSettings
from speech_flax.training.front_end import FrontEnd, LogMelFrontEnd, WaveformFrontEnd
from speech_flax.training.task import WeightLoader

#: Ends of the names of model classes, by task.
HEADS = {
    "ctc": "ForCTC",
    "sequence_classification": "ForSequenceClassification",
    "frame_classification": "ForAudioFrameClassification",
    "xvector": "ForXVector",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the training program needs to know of a model family.

    Attributes:
      prefix: Beginning of the names of its classes.
      extractor_name: Class of its feature extractor.
      extractor_options: Options of a new feature extractor, from the experiment's features.
      front_end: What computes on the device what a feature extractor does.
      decided_fields: Fields of the configuration that the feature extractor decides.
      lengths: How many frames of the model's output are audio, from the mask of its input and the configuration.
      frame_seconds: Distance of output frames, from feature extractor and configuration.
    """

    prefix: str
    extractor_name: str
    extractor_options: Callable[[FeatureSettings], dict[str, Any]]
    front_end: Callable[[Any], FrontEnd]
    decided_fields: Callable[[Any], dict[str, Any]]
    lengths: Callable[[Bool[Array, "batch positions"], SpeechConfig], Int[Array, "batch"]]
    frame_seconds: Callable[[Any, SpeechConfig], float]

    def classes(self, task: str) -> tuple[type, type]:
        """The classes of configuration and model.

        Raises:
            ExperimentError: when the family has no model for the task.
        """
        name = self.prefix + HEADS[task]
        if name not in speech_flax.__all__:
            raise ExperimentError(f"there is no {name}: choose another task, or another model.family")
        return getattr(speech_flax, f"{self.prefix}Config"), getattr(speech_flax, name)

    def extractor_class(self) -> type:
        return getattr(speech_flax, self.extractor_name)

    def processor_class(self) -> type:
        """Feature extractor and tokenizer in one."""
        return getattr(speech_flax, "Wav2Vec2BertProcessor" if self.prefix == "Wav2Vec2Bert" else "Wav2Vec2Processor")

    def make_extractor(self, experiment: Experiment) -> Any:
        """The feature extractor of the pretrained model, or a new one."""
        if experiment.model.pretrained is not None:
            return self.extractor_class().from_pretrained(experiment.model.pretrained)
        return self.extractor_class()(**self.extractor_options(experiment.features))


FAMILIES = {
    "wav2vec2-bert": Family(
        prefix="Wav2Vec2Bert",
        extractor_name="SeamlessM4TFeatureExtractor",
        extractor_options=lambda features: {
            "feature_size": features.num_mel_bins,
            "num_mel_bins": features.num_mel_bins,
            "stride": features.stride,
        },
        front_end=lambda extractor: LogMelFrontEnd(extractor.num_mel_bins, extractor.stride, extractor.padding_value),
        decided_fields=lambda extractor: {"feature_projection_input_dim": extractor.num_mel_bins * extractor.stride},
        lengths=lambda mask, config: adapter_output_lengths(mask.sum(-1).astype(jnp.int32), config),
        frame_seconds=lambda extractor, config: (
            0.01 * extractor.stride * (config.adapter_stride**config.num_adapter_layers if config.add_adapter else 1)
        ),
    ),
    "hubert": Family(
        prefix="Hubert",
        extractor_name="Wav2Vec2FeatureExtractor",
        extractor_options=lambda features: {},
        front_end=lambda extractor: WaveformFrontEnd(extractor.do_normalize),
        decided_fields=lambda extractor: {},
        lengths=labelled_frames,
        frame_seconds=lambda extractor, config: config.inputs_to_logits_ratio / extractor.sampling_rate,
    ),
}


def check_fields(fields: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuse a field that the model's configuration does not have.

    Raises:
        ExperimentError: with the nearest that it has.
    """
    for name in fields:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ExperimentError(f"model.config has no field {name!r}{hint}")


def make_model(experiment: Experiment, decided: dict[str, Any]) -> tuple[nn.Module, WeightLoader | None]:
    """The model that ``experiment`` describes, and what loads its pretrained weights (``None`` if it starts from random
    ones), which raises ExperimentError for weights that do not fit.

    Fields of its configuration are the experiment's; where that says nothing, those ``decided`` by the task, then those
    of the pretrained model or the defaults.

    Raises:
        ExperimentError: for settings that the model does not have or take.
    """
    settings = experiment.model
    config_class, model_class = FAMILIES[settings.family].classes(experiment.task)
    check_fields(settings.config, config_class.field_names())
    fields = decided | settings.config
    try:
        if settings.pretrained is None:
            load_weights, config = None, config_class.from_dict(fields)
        else:
            load_weights = partial(_load_weights, model_class, settings.pretrained, fields)
            config = config_class.from_pretrained(pretrained_directory(settings.pretrained), **fields)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"model: {error}") from error
    model = model_class(config, dtype=jnp.dtype(settings.dtype), remat=settings.remat, scan_unroll=settings.scan_unroll)
    return model, load_weights


def _load_weights(model_class: type, pretrained: str, fields: dict[str, Any]) -> PyTree:
    try:
        return model_class.from_pretrained(pretrained, **fields)[1]
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"model: {error}") from error
