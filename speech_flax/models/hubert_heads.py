"""HuBERT that classifies: the signature of Transformers over the head of both families."""

from typing import Any

from jaxtyping import Array, Bool

from speech_flax.configuration import HubertConfig
from speech_flax.layers.masks import feature_frame_mask
from speech_flax.models.heads import Labels, SequenceClassification, as_output
from speech_flax.models.hubert import HubertModel, HubertPretrainedModel, SampleMask, Waveforms
from speech_flax.outputs import SequenceClassifierOutput


def output_frame_mask(attention_mask: Array, num_frames: int, config: HubertConfig) -> Bool[Array, "batch frames"]:
    """Which frames of the model's output are no padding."""
    return feature_frame_mask(attention_mask.astype(bool), config)[:, :num_frames]


class HubertForSequenceClassification(HubertPretrainedModel, SequenceClassification):
    """The model with one label per utterance: keywords, languages, emotions, or a value.

    Attributes are those of :class:`~speech_flax.HubertModel`.

    Raises:
      ValueError: the configuration has an adapter.
    """

    base_model_prefix = "hubert"
    base_model_class = HubertModel
    frame_mask = staticmethod(output_frame_mask)

    def __call__(
        self,
        input_values: Waveforms,
        attention_mask: SampleMask | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Labels | None = None,
        *,
        deterministic: bool = True,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Score every label, and compute the loss if ``labels`` are given.

        Args:
          input_values: Waveforms at 16 kHz, from :class:`~speech_flax.Wav2Vec2FeatureExtractor`.
          attention_mask: 1 for samples that count, 0 for padding on the right; all count by default.
          output_attentions: Return attention probabilities; default ``config.output_attentions``.
          output_hidden_states: Return the states of all layers; default ``config.output_hidden_states``.
          return_dict: ``False`` returns a tuple.
          labels: Class ids ``[batch]``, of which -100 does not count (cross-entropy); values, if there is one label
            (mean squared error); zeros and ones ``[batch, labels]``, if ``config.problem_type`` is
            ``"multi_label_classification"`` (binary cross-entropy).
          deterministic: No dropout, SpecAugment or LayerDrop.
        """
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        output = self.classify(input_values, attention_mask, labels, deterministic=deterministic, **options)
        return as_output(output, return_dict)
