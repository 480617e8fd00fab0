"""Names of Hugging Face Transformers' PyTorch models, both families, every head."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import PyTree

from speech_flax.conversion.rules import (
    MAGNITUDE,
    SAME,
    TRANSPOSED,
    NameTable,
    Place,
    Rule,
    Transform,
    convolution,
    linear,
    norm,
    pointwise,
)
from speech_flax.conversion.tree import leaf_places, parameter_tree, places, tensor_at

_LAYER = "encoder.layers.{layer}"
_DENSE = "{dense:intermediate|output}_dense"
_POSITIONS = "encoder.pos_conv_embed"

_SHARED = (
    Rule("masked_spec_embed", "masked_spec_embed"),
    *norm("feature_projection.layer_norm"),
    *linear("feature_projection.projection"),
)

_HUBERT = (
    *convolution("feature_extractor.conv_layers.{index}.conv"),
    *norm("feature_extractor.conv_layers.{index}.layer_norm"),
    Rule(f"{_POSITIONS}.conv.parametrizations.weight.original0", "encoder/pos_conv_embed/conv/weight_g", MAGNITUDE),
    Rule(f"{_POSITIONS}.conv.parametrizations.weight.original1", "encoder/pos_conv_embed/conv/weight_v", TRANSPOSED),
    Rule(f"{_POSITIONS}.conv.weight_g", "encoder/pos_conv_embed/conv/weight_g", MAGNITUDE),
    Rule(f"{_POSITIONS}.conv.weight_v", "encoder/pos_conv_embed/conv/weight_v", TRANSPOSED),
    *convolution(f"{_POSITIONS}.conv"),
    *norm(f"{_POSITIONS}.batch_norm"),
    Rule(f"{_POSITIONS}.batch_norm.running_mean", "encoder/pos_conv_embed/batch_norm/mean"),
    Rule(f"{_POSITIONS}.batch_norm.running_var", "encoder/pos_conv_embed/batch_norm/var"),
    *norm("encoder.layer_norm"),
    *linear(_LAYER + ".attention.{part:q|k|v|out}_proj"),
    *norm(_LAYER + ".{norm:layer_norm|final_layer_norm}"),
    *linear(f"{_LAYER}.feed_forward.{_DENSE}"),
    *norm(_LAYER + ".adapter_layer.norm"),
    *linear(_LAYER + ".adapter_layer.{linear:linear_1|linear_2}"),
)

_WAV2VEC2_BERT = (
    *norm(_LAYER + ".{norm:ffn1_layer_norm|ffn2_layer_norm|self_attn_layer_norm|final_layer_norm}"),
    *linear(_LAYER + ".{ffn:ffn1|ffn2}." + _DENSE),
    *linear(_LAYER + ".self_attn.linear_{part:q|k|v|out|pos}"),
    Rule(f"{_LAYER}.self_attn.distance_embedding.weight", "encoder/layers/self_attn/distance_embedding/embedding"),
    Rule(_LAYER + ".self_attn.pos_bias_{part:u|v}", "encoder/layers/self_attn/pos_bias_{part}", SAME),
    *norm(_LAYER + ".conv_module.{norm:layer_norm|depthwise_layer_norm}"),
    *pointwise(_LAYER + ".conv_module.{conv:pointwise_conv1|pointwise_conv2}"),
    *convolution(_LAYER + ".conv_module.depthwise_conv"),
    *linear("intermediate_ffn." + _DENSE),
    *linear("adapter.proj"),
    *norm("adapter.proj_layer_norm"),
    *norm("adapter.layers.{index}.{norm:residual_layer_norm|self_attn_layer_norm|ffn_layer_norm}"),
    *convolution("adapter.layers.{index}.{conv:residual_conv|self_attn_conv}"),
    *linear("adapter.layers.{index}.self_attn.linear_{part:q|k|v|out}"),
    *linear("adapter.layers.{index}.ffn." + _DENSE),
)

_HEADS = (
    *linear("{head:lm_head|projector|classifier}"),
    Rule("layer_weights", "layer_weights"),
    *linear("tdnn.{index}.kernel"),
    *linear("feature_extractor"),
    Rule("objective.weight", "objective/weight"),
)


def _below(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a base model that is part of a model with a head."""
    return tuple(Rule(f"{prefix}.{rule.theirs}", f"{prefix}/{rule.ours}", rule.transform) for rule in rules)


_BASE = (*_SHARED, *_HUBERT, *_WAV2VEC2_BERT)

#: Transformers' names. Checkpoints of the first HuBERT conversions hold ``mask_time_emb_vector``, which nothing reads;
#: older ones of Wav2Vec2-BERT may hold tables of positions and rotations that are computed.
TRANSFORMERS = NameTable(
    rules=(*_BASE, *_below("hubert", _BASE), *_below("wav2vec2_bert", _BASE), *_HEADS),
    dropped=(
        r"(\w+\.)?mask_time_emb_vector",
        r"(\w+\.)?encoder\.pos_conv_embed\.batch_norm\.num_batches_tracked",
        r"(\w+\.)?encoder\.embed_positions\.(inv_freq|pe)",
    ),
    constants=(("batch_norm.num_batches_tracked", "batch_norm.running_var", np.zeros((), np.int64)),),
)


def transformers_layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Place, Transform, tuple[int, ...]]]:
    """Every tensor of a file for Transformers by name: its place here, how it changes, its shape there.

    Args:
      shapes: Shape of every leaf of our parameters by path.

    Raises:
      ValueError: Transformers knows no such parameter.
    """
    layout = {}
    for path, shape in shapes.items():
        for place in leaf_places(path, shape):
            found = TRANSFORMERS.name(place)
            if found is None:
                raise ValueError(f"Transformers has no parameter that corresponds to {place}")
            name, transform = found
            layout[name] = place, transform, transform.their_shape(shape[place.layer is not None :])
    return layout


def from_torch_names(state: Mapping[str, np.ndarray], table: NameTable = TRANSFORMERS) -> PyTree:
    """Our parameters from tensors under foreign names; every dtype is kept.

    Raises:
      ValueError: a name that the table does not know, two names for one place, or encoder layers that are missing.
    """
    tensors: dict = {}
    for name, tensor in state.items():
        if table.drops(name):
            continue
        found = table.place(name)
        if found is None:
            raise ValueError(f"there is no rule for the tensor {name!r} of shape {tuple(tensor.shape)}")
        place, transform = found
        if place in tensors:
            raise ValueError(f"the tensor {name!r} is a second one for {place}")
        tensors[place] = transform.to_ours(tensor)
    return parameter_tree(tensors)


def to_torch_names(params: PyTree, table: NameTable = TRANSFORMERS) -> dict[str, np.ndarray]:
    """Tensors under foreign names from our parameters; the inverse of :func:`from_torch_names`.

    Raises:
      ValueError: a parameter that has no name there.
    """
    state: dict[str, np.ndarray] = {}
    for place in places(params):
        found = table.name(place)
        if found is None:
            raise ValueError(f"the parameter {place} has no name in this format")
        name, transform = found
        state[name] = np.ascontiguousarray(transform.to_theirs(tensor_at(params, place)))
    return state | table.constants_of(state)
