"""The configuration of a model, read off the shapes of its tensors where the checkpoint carries none."""

import ast
from collections.abc import Mapping
from typing import Any

from speech_flax.configuration import HubertConfig, SpeechConfig, Wav2Vec2BertConfig

Shapes = Mapping[str, tuple[int, ...]]

#: Stride by kernel size of the adapters that were published: w2v-BERT 2.0 of fairseq2, and SeamlessM4T.
_USUAL_ADAPTER_STRIDES = {3: 2, 8: 8}
_MEANINGS = {"pad_token_id": ", the blank of CTC,"}
_ACTIVATION_NAMES = {"gelu": "gelu", "relu": "relu", "swish": "swish"}


def infer_config(shapes: Shapes, settings: Mapping[str, Any]) -> tuple[SpeechConfig, list[str]]:
    """The configuration of the model that has parameters of these ``shapes``.

    Args:
      shapes: Shape of each leaf by our path, without the name of a base model in front; encoder layers stacked.
      settings: Fields that the checkpoint states, by our names; they win over what is assumed.

    Returns:
      The configuration, and a sentence for everything in it that shapes do not tell and the checkpoint does not state.

    Raises:
      ValueError: the shapes are of no model of this library, or contradict each other.
    """
    if "feature_projection/projection/kernel" not in shapes:
        raise ValueError("there is no feature projection, which every HuBERT and Wav2Vec2-BERT has")
    family = _hubert if "feature_extractor/conv_layers_0/conv/kernel" in shapes else _wav2vec2_bert
    try:
        return family(shapes, dict(settings))
    except KeyError as missing:
        raise ValueError(f"{missing.args[0]} is missing, which the size of the model is read from") from None


def _hubert(shapes: Shapes, settings: dict[str, Any]) -> tuple[SpeechConfig, list[str]]:
    assumptions = _Assumptions(settings)
    count = sum(path.startswith("feature_extractor/conv_layers_") and path.endswith("conv/kernel") for path in shapes)
    kernels = [shapes[f"feature_extractor/conv_layers_{index}/conv/kernel"] for index in range(count)]
    hidden = shapes["feature_projection/projection/kernel"][1]
    positions = "encoder/pos_conv_embed/conv"
    width, per_group, _ = shapes.get(f"{positions}/weight_v") or shapes[f"{positions}/kernel"]
    every_layer = "feature_extractor/conv_layers_1/layer_norm/scale" in shapes
    strides = HubertConfig().conv_stride
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": shapes["encoder/layers/attention/q_proj/kernel"][0],
        "intermediate_size": shapes["encoder/layers/feed_forward/intermediate_dense/kernel"][2],
        "conv_dim": tuple(kernel[2] for kernel in kernels),
        "conv_kernel": tuple(kernel[0] for kernel in kernels),
        "conv_stride": assumptions.take("conv_stride", strides if count == len(strides) else None),
        "conv_bias": "feature_extractor/conv_layers_0/conv/bias" in shapes,
        "feat_extract_norm": "layer" if every_layer else "group",
        "feat_proj_layer_norm": "feature_projection/layer_norm/scale" in shapes,
        "num_conv_pos_embeddings": width,
        "num_conv_pos_embedding_groups": hidden // per_group,
        "conv_pos_batch_norm": "encoder/pos_conv_embed/batch_norm/scale" in shapes,
        "do_stable_layer_norm": assumptions.take("do_stable_layer_norm", every_layer),
        "num_attention_heads": assumptions.take("num_attention_heads", _usual_heads(hidden)),
        "hidden_act": assumptions.take("hidden_act", "gelu"),
    }
    if "encoder/layers/adapter_layer/linear_1/kernel" in shapes:
        fields["adapter_attn_dim"] = shapes["encoder/layers/adapter_layer/linear_1/kernel"][2]
    fields |= _head_fields(shapes, assumptions)
    return HubertConfig.from_dict(fields | _rest(settings, fields)), assumptions.made


def _wav2vec2_bert(shapes: Shapes, settings: dict[str, Any]) -> tuple[SpeechConfig, list[str]]:
    assumptions = _Assumptions(settings)
    inputs, hidden = shapes["feature_projection/projection/kernel"]
    attention = "encoder/layers/self_attn"
    fields: dict[str, Any] = {
        "feature_projection_input_dim": inputs,
        "hidden_size": hidden,
        "num_hidden_layers": shapes[f"{attention}/linear_q/kernel"][0],
        "intermediate_size": shapes["encoder/layers/ffn1/intermediate_dense/kernel"][2],
        "conv_depthwise_kernel_size": shapes["encoder/layers/conv_module/depthwise_conv/kernel"][1],
        "hidden_act": assumptions.take("hidden_act", "swish"),
    }
    heads = _usual_heads(hidden)
    if f"{attention}/distance_embedding/embedding" in shapes:
        _, distances, head_size = shapes[f"{attention}/distance_embedding/embedding"]
        left = assumptions.take("left_max_position_embeddings", (distances - 1) * 64 // 72)
        fields |= {"position_embeddings_type": "relative_key", "num_attention_heads": hidden // head_size}
        fields |= {"left_max_position_embeddings": left, "right_max_position_embeddings": distances - 1 - left}
    elif f"{attention}/pos_bias_u" in shapes:
        fields |= {"position_embeddings_type": "relative", "num_attention_heads": shapes[f"{attention}/pos_bias_u"][1]}
    else:
        fields["position_embeddings_type"] = assumptions.take("position_embeddings_type", "rotary")
        fields["num_attention_heads"] = assumptions.take("num_attention_heads", heads)
    if "adapter/layers_0/residual_conv/kernel" in shapes:
        kernels = [path for path in shapes if path.startswith("adapter/") and path.endswith("residual_conv/kernel")]
        width, output, _ = shapes["adapter/layers_0/residual_conv/kernel"]
        fields |= {"add_adapter": True, "num_adapter_layers": len(kernels), "adapter_kernel_size": width}
        stride = assumptions.take("adapter_stride", _USUAL_ADAPTER_STRIDES.get(width))
        fields |= {"output_hidden_size": output, "adapter_stride": stride}
        fields["use_intermediate_ffn_before_adapter"] = "intermediate_ffn/intermediate_dense/kernel" in shapes
    fields |= _head_fields(shapes, assumptions) | _time_delay_fields(shapes, assumptions)
    return Wav2Vec2BertConfig.from_dict(fields | _rest(settings, fields)), assumptions.made


class _Assumptions:
    """What is taken from the settings of a checkpoint, or else assumed and noted."""

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        self.made: list[str] = []

    def take(self, field: str, otherwise: Any) -> Any:
        if self.settings.get(field) is not None:
            return self.settings[field]
        if otherwise is None:
            raise ValueError(f"the file does not say {field}, and nothing usual fits its shapes")
        meaning = _MEANINGS.get(field, "")
        self.made.append(f"{field} = {otherwise!r}{meaning} is what is usual, the file does not say")
        return otherwise


def _rest(settings: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in fields and value is not None}


def _usual_heads(hidden: int) -> int:
    """Heads of 64 features; HuBERT xlarge has 16 of 80."""
    return 16 if hidden == 1280 else max(1, hidden // 64)


def _head_fields(shapes: Shapes, assumptions: _Assumptions) -> dict[str, Any]:
    fields: dict[str, Any] = {"use_weighted_layer_sum": "layer_weights" in shapes}
    if "lm_head/kernel" in shapes:
        fields["vocab_size"] = shapes["lm_head/kernel"][1]
        fields["pad_token_id"] = assumptions.take("pad_token_id", 0)
    if "projector/kernel" in shapes and "tdnn_0/kernel/kernel" not in shapes:
        fields["classifier_proj_size"] = shapes["projector/kernel"][1]
    if "classifier/kernel" in shapes and "objective/weight" not in shapes:
        fields["num_labels"] = shapes["classifier/kernel"][1]
    return fields


def _time_delay_fields(shapes: Shapes, assumptions: _Assumptions) -> dict[str, Any]:
    count = sum(path.startswith("tdnn_") and path.endswith("/kernel/kernel") for path in shapes)
    if not count:
        return {}
    usual = Wav2Vec2BertConfig()
    widths, previous = [], shapes["projector/kernel"][1]
    outputs = [shapes[f"tdnn_{index}/kernel/kernel"][-1] for index in range(count)]
    for index, output in enumerate(outputs):
        widths.append(shapes[f"tdnn_{index}/kernel/kernel"][0] // previous)
        previous = output
    return {
        "tdnn_dim": tuple(outputs),
        "tdnn_kernel": tuple(widths),
        "tdnn_dilation": assumptions.take("tdnn_dilation", usual.tdnn_dilation if count == 5 else None),
        "xvector_output_dim": shapes["feature_extractor/kernel"][1],
        "num_labels": shapes["objective/weight"][1],
    }


def fairseq_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the settings of a fairseq model, as far as shapes do not tell them."""
    convolutions = _convolutions(settings.get("conv_feature_layers"))
    return {
        "num_attention_heads": settings.get("encoder_attention_heads"),
        "do_stable_layer_norm": settings.get("layer_norm_first"),
        "hidden_act": _ACTIVATION_NAMES.get(str(settings.get("activation_fn"))),
        "conv_stride": None if convolutions is None else tuple(stride for _, _, stride in convolutions),
        "pad_token_id": 0,  # the first symbol is the blank, always
    }


def _convolutions(text: Any) -> list[tuple[int, int, int]] | None:
    """The (channels, width, stride) of ``"[(512,10,5)] + [(512,3,2)] * 4"``, computed without evaluating it."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.List | ast.Tuple):
            return [value(one) for one in node.elts] if isinstance(node, ast.List) else tuple(map(value, node.elts))
        if isinstance(node, ast.Constant) and type(node.value) is int and 0 < node.value < 10_000:
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right = value(node.left), value(node.right)
            if isinstance(left, list) and isinstance(right, int) and right < 100:
                return left * right
        raise ValueError("no list of convolutions")

    try:
        found = value(ast.parse(text, mode="eval").body)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return found if all(isinstance(one, tuple) and len(one) == 3 for one in found) else None
