"""What the models return. Field names are those of Transformers; absent fields are ``None``."""

from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Array, Float

HiddenStates = tuple[Float[Array | np.ndarray, "batch encoder_frames encoder_hidden"], ...]
Attentions = tuple[Float[Array | np.ndarray, "batch heads encoder_frames encoder_frames"], ...]


class ModelOutput:
    """Mixin: tuple view of an output, without the fields that are ``None``."""

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return tuple(value for value in values if value is not None)

    def __getitem__(self, index: int | str) -> Any:
        return getattr(self, index) if isinstance(index, str) else self.to_tuple()[index]


@flax.struct.dataclass
class BaseModelOutput(ModelOutput):
    """Output of :class:`~speech_flax.HubertModel`.

    ``hidden_states`` holds the input of every layer and the output of the last one; ``attentions`` the attention
    probabilities of every layer.
    """

    last_hidden_state: Float[Array | np.ndarray, "batch frames hidden"]
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None


@flax.struct.dataclass
class Wav2Vec2BaseModelOutput(ModelOutput):
    """Output of :class:`~speech_flax.Wav2Vec2BertModel`.

    ``extract_features`` is the layer-normalised input of the feature projection. ``hidden_states`` holds the input of
    every layer and the output of the last one; ``attentions`` the attention probabilities of every layer.
    """

    last_hidden_state: Float[Array | np.ndarray, "batch frames hidden"]
    extract_features: Float[Array | np.ndarray, "batch input_frames features"]
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None


@flax.struct.dataclass
class CausalLMOutput(ModelOutput):
    """Output of a CTC model: ``logits`` before the softmax; ``loss``, and the number of ``infeasible`` utterances, when
    labels were given."""

    loss: Array | np.ndarray | None = None
    logits: Float[Array | np.ndarray, "batch frames vocabulary"] | None = None
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None
    infeasible: Array | np.ndarray | None = None


@flax.struct.dataclass
class SequenceClassifierOutput(ModelOutput):
    """Output of a model that classifies utterances: ``logits`` before the softmax; ``loss`` when labels were given."""

    loss: Array | np.ndarray | None = None
    logits: Float[Array | np.ndarray, "batch labels"] | None = None
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None


@flax.struct.dataclass
class TokenClassifierOutput(ModelOutput):
    """Output of a model that classifies frames: ``logits`` before the softmax; ``loss`` when labels were given."""

    loss: Array | np.ndarray | None = None
    logits: Float[Array | np.ndarray, "batch frames labels"] | None = None
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None


@flax.struct.dataclass
class XVectorOutput(ModelOutput):
    """Output of a model that embeds speakers: ``embeddings``, by whose cosine speakers are compared; ``logits`` made of
    them, which training compares with its speakers; ``loss`` when labels were given."""

    loss: Array | np.ndarray | None = None
    logits: Float[Array | np.ndarray, "batch dimensions"] | None = None
    embeddings: Float[Array | np.ndarray, "batch dimensions"] | None = None
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None
