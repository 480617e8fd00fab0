"""Names of fairseq's HuBERT checkpoints, pre-trained and fine-tuned with CTC."""

from collections.abc import Collection

from speech_flax.conversion.rules import MAGNITUDE, TRANSPOSED, NameTable, Rule, convolution, linear, norm

_LAYER = "encoder.layers.{layer}"
_OUR_LAYER = "encoder/layers"
_POSITIONS = "encoder/pos_conv_embed"
_CONVOLUTION = "feature_extractor/conv_layers_{index}"

#: What a fine-tuned model holds its encoder under.
FINE_TUNED = "w2v_encoder.w2v_model."

_ENCODER = (
    Rule("mask_emb", "masked_spec_embed"),
    *convolution("feature_extractor.conv_layers.{index}.0", f"{_CONVOLUTION}/conv"),
    *norm("layer_norm", "feature_projection/layer_norm"),
    *linear("post_extract_proj", "feature_projection/projection"),
    *norm("encoder.layer_norm"),
    *linear(_LAYER + ".self_attn.{part:q|k|v|out}_proj", _OUR_LAYER + "/attention/{part}_proj"),
    *norm(f"{_LAYER}.self_attn_layer_norm", f"{_OUR_LAYER}/layer_norm"),
    *linear(f"{_LAYER}.fc1", f"{_OUR_LAYER}/feed_forward/intermediate_dense"),
    *linear(f"{_LAYER}.fc2", f"{_OUR_LAYER}/feed_forward/output_dense"),
    *norm(f"{_LAYER}.final_layer_norm", f"{_OUR_LAYER}/final_layer_norm"),
)
#: Base models normalise over time after the first convolution, the others over channels after every one.
_GROUP_NORM = norm("feature_extractor.conv_layers.{index}.2", f"{_CONVOLUTION}/layer_norm")
_LAYER_NORM = norm("feature_extractor.conv_layers.{index}.2.1", f"{_CONVOLUTION}/layer_norm")
_WEIGHT_NORM = (
    Rule("encoder.pos_conv.0.weight_g", f"{_POSITIONS}/conv/weight_g", MAGNITUDE),
    Rule("encoder.pos_conv.0.weight_v", f"{_POSITIONS}/conv/weight_v", TRANSPOSED),
    Rule("encoder.pos_conv.0.bias", f"{_POSITIONS}/conv/bias"),
)
_BATCH_NORM = (
    *norm("encoder.pos_conv.0", f"{_POSITIONS}/batch_norm"),
    Rule("encoder.pos_conv.0.running_mean", f"{_POSITIONS}/batch_norm/mean"),
    Rule("encoder.pos_conv.0.running_var", f"{_POSITIONS}/batch_norm/var"),
    *convolution("encoder.pos_conv.1", f"{_POSITIONS}/conv"),
)


def fairseq_table(names: Collection[str]) -> NameTable:
    """The rules for a checkpoint with these ``names``: three things are decided by which of them are there."""
    norms = _LAYER_NORM if any(".2.1.weight" in name for name in names) else _GROUP_NORM
    positions = _BATCH_NORM if any(name.endswith("pos_conv.0.running_mean") for name in names) else _WEIGHT_NORM
    rules = (*_ENCODER, *norms, *positions)
    prefix = ""
    if any(name.startswith(FINE_TUNED) for name in names):
        prefix = FINE_TUNED
        below = (Rule(FINE_TUNED + rule.theirs, f"hubert/{rule.ours}", rule.transform) for rule in rules)
        rules = (*below, *linear("w2v_encoder.proj", "lm_head"))
    beginning = prefix.replace(".", r"\.")
    dropped = (r"label_embs_concat", r"final_proj\.(weight|bias)", r"encoder\.pos_conv\.0\.num_batches_tracked")
    return NameTable(rules, tuple(beginning + pattern for pattern in dropped))
