"""Names of the original w2v-BERT 2.0 checkpoints: as released (``conformer_shaw.pt``), and as fairseq2 writes them."""

from speech_flax.conversion.rules import NameTable, Rule, convolution, linear, norm, pointwise

_LAYER = "encoder.layers.{layer}"
_OUR_LAYER = "encoder/layers"
_SECOND_TABLE = f"{_OUR_LAYER}/self_attn/distance_embedding/embedding"

#: Parts of pre-training that the encoder does not use: quantiser, contrastive and masked-prediction projections, and a
#: final norm that the released model never applies.
SEAMLESS = NameTable(
    rules=(
        Rule("mask_emb", "masked_spec_embed"),
        *norm("layer_norm", "feature_projection/layer_norm"),
        *linear("post_extract_proj", "feature_projection/projection"),
        *norm(_LAYER + ".{ffn:ffn1|ffn2}.layer_norm", _OUR_LAYER + "/{ffn}_layer_norm"),
        *linear(_LAYER + ".{ffn:ffn1|ffn2}.w_1", _OUR_LAYER + "/{ffn}/intermediate_dense"),
        *linear(_LAYER + ".{ffn:ffn1|ffn2}.w_2", _OUR_LAYER + "/{ffn}/output_dense"),
        *norm(_LAYER + ".{norm:self_attn_layer_norm|final_layer_norm}"),
        *linear(_LAYER + ".self_attn.{part:q|k|v|out}_proj", _OUR_LAYER + "/self_attn/linear_{part}"),
        Rule(f"{_LAYER}.self_attn.rel_k_embedding.weight", _SECOND_TABLE),
        *norm(f"{_LAYER}.conv_module.layer_norm"),
        *norm(f"{_LAYER}.conv_module.layer_norm2", f"{_OUR_LAYER}/conv_module/depthwise_layer_norm"),
        *pointwise(_LAYER + ".conv_module.{conv:pointwise_conv1|pointwise_conv2}"),
        *convolution(f"{_LAYER}.conv_module.depthwise_conv"),
    ),
    dropped=(
        r"quantizer\..*",
        r"(project_q|final_proj|mlm_proj|encoder\.layer_norm)\.(weight|bias)",
    ),
)

_ADAPTER = "encoder.adaptor_layers.{index}"
_OUR_ADAPTER = "adapter/layers_{index}"

FAIRSEQ2 = NameTable(
    rules=(
        Rule("masker.temporal_mask_embed", "masked_spec_embed"),
        *norm("encoder_frontend.post_extract_layer_norm", "feature_projection/layer_norm"),
        *linear("encoder_frontend.model_dim_proj", "feature_projection/projection"),
        *norm(_LAYER + ".{norm:ffn1_layer_norm|ffn2_layer_norm|self_attn_layer_norm}"),
        *linear(_LAYER + ".{ffn:ffn1|ffn2}.inner_proj", _OUR_LAYER + "/{ffn}/intermediate_dense"),
        *linear(_LAYER + ".{ffn:ffn1|ffn2}.output_proj", _OUR_LAYER + "/{ffn}/output_dense"),
        *linear(_LAYER + ".self_attn.{part:q|k|v}_proj", _OUR_LAYER + "/self_attn/linear_{part}"),
        *linear(f"{_LAYER}.self_attn.output_proj", f"{_OUR_LAYER}/self_attn/linear_out"),
        Rule(f"{_LAYER}.self_attn.sdpa.rel_k_embed.weight", _SECOND_TABLE),
        Rule(_LAYER + ".self_attn.sdpa.{part:u|v}_bias", _OUR_LAYER + "/self_attn/pos_bias_{part}"),
        *linear(f"{_LAYER}.self_attn.sdpa.r_proj", f"{_OUR_LAYER}/self_attn/linear_pos"),
        *norm(f"{_LAYER}.conv_layer_norm", f"{_OUR_LAYER}/conv_module/layer_norm"),
        *norm(f"{_LAYER}.conv.layer_norm", f"{_OUR_LAYER}/conv_module/depthwise_layer_norm"),
        *pointwise(_LAYER + ".conv.{conv:pointwise_conv1|pointwise_conv2}", _OUR_LAYER + "/conv_module/{conv}"),
        *convolution(f"{_LAYER}.conv.depthwise_conv", f"{_OUR_LAYER}/conv_module/depthwise_conv"),
        *norm(f"{_LAYER}.layer_norm", f"{_OUR_LAYER}/final_layer_norm"),
        *linear("encoder.proj1", "intermediate_ffn/intermediate_dense"),
        *linear("encoder.proj2", "intermediate_ffn/output_dense"),
        *norm(_ADAPTER + ".{norm:residual_layer_norm|self_attn_layer_norm|ffn_layer_norm}", _OUR_ADAPTER + "/{norm}"),
        *convolution(_ADAPTER + ".{conv:residual_conv|self_attn_conv}", _OUR_ADAPTER + "/{conv}"),
        *linear(_ADAPTER + ".self_attn.{part:q|k|v}_proj", _OUR_ADAPTER + "/self_attn/linear_{part}"),
        *linear(f"{_ADAPTER}.self_attn.output_proj", f"{_OUR_ADAPTER}/self_attn/linear_out"),
        *linear(f"{_ADAPTER}.ffn.inner_proj", f"{_OUR_ADAPTER}/ffn/intermediate_dense"),
        *linear(f"{_ADAPTER}.ffn.output_proj", f"{_OUR_ADAPTER}/ffn/output_dense"),
    ),
    dropped=(
        r"quantizer\..*",
        r"(final_proj|final_target_proj)\.(weight|bias)",
    ),
)
