"""Names of Transformers' TensorFlow models (``tf_model.h5``), which are HuBERT's alone.

Linear layers and convolutions are laid out as ours; norms have a ``gamma`` and a ``beta``.
"""

import numpy as np

from speech_flax.conversion.rules import TRANSPOSED, NameTable, Rule, Transform

#: TensorFlow keeps the magnitudes of the positional convolution as [width, 1, 1].
_MAGNITUDE = Transform(lambda tensor: np.squeeze(tensor, (1, 2)), lambda tensor: tensor[:, None, None])
_LAYER = "encoder/layers.{layer}"
_OUR_LAYER = "encoder/layers"
_CONVOLUTION = "feature_extractor/conv_layers.{index}"
_OUR_CONVOLUTION = "feature_extractor/conv_layers_{index}"
_POSITIONS = "encoder/pos_conv_embed/conv"


def _dense(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}/kernel", f"{ours}/kernel"), Rule(f"{theirs}/bias", f"{ours}/bias")


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}/gamma", f"{ours}/scale"), Rule(f"{theirs}/beta", f"{ours}/bias")


_BASE = (
    Rule("masked_spec_embed", "masked_spec_embed"),
    *_dense(f"{_CONVOLUTION}/conv", f"{_OUR_CONVOLUTION}/conv"),
    *_norm(f"{_CONVOLUTION}/layer_norm", f"{_OUR_CONVOLUTION}/layer_norm"),
    *_norm("feature_projection/layer_norm", "feature_projection/layer_norm"),
    *_dense("feature_projection/projection", "feature_projection/projection"),
    Rule(f"{_POSITIONS}/weight_g", f"{_POSITIONS}/weight_g", _MAGNITUDE),
    Rule(f"{_POSITIONS}/weight_v", f"{_POSITIONS}/weight_v", TRANSPOSED),
    Rule(f"{_POSITIONS}/bias", f"{_POSITIONS}/bias"),
    *_norm("encoder/layer_norm", "encoder/layer_norm"),
    *_dense(_LAYER + "/attention/{part:q|k|v|out}_proj", _OUR_LAYER + "/attention/{part}_proj"),
    *_norm(_LAYER + "/{norm:layer_norm|final_layer_norm}", _OUR_LAYER + "/{norm}"),
    *_dense(_LAYER + "/feed_forward/{dense:intermediate|output}_dense", _OUR_LAYER + "/feed_forward/{dense}_dense"),
)

TENSORFLOW = NameTable(
    rules=(
        *(Rule(f"hubert/{rule.theirs}", f"hubert/{rule.ours}", rule.transform) for rule in _BASE),
        *_dense("lm_head", "lm_head"),
    )
)
