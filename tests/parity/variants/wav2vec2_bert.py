"""Wav2Vec2-BERT: the bare model, then with CTC."""

from ..variant import Variant

_ADAPTER = {"add_adapter": True}
_TWO_LAYERS = _ADAPTER | {"num_adapter_layers": 2}
_FEED_FORWARD = _ADAPTER | {"use_intermediate_ffn_before_adapter": True}
_KERNEL_5 = _ADAPTER | {"adapter_kernel_size": 5, "adapter_stride": 4}
_ROTARY = {"position_embeddings_type": "rotary"}
_NO_MASKS = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}

VARIANTS = (
    Variant("Wav2Vec2BertModel", "relative_key"),
    Variant("Wav2Vec2BertModel", "relative_key, wide", {"left_max_position_embeddings": 64}),
    Variant("Wav2Vec2BertModel", "relative_key, nothing to the right", {"right_max_position_embeddings": 0}),
    Variant("Wav2Vec2BertModel", "relative", {"position_embeddings_type": "relative"}),
    Variant("Wav2Vec2BertModel", "rotary", _ROTARY),
    Variant("Wav2Vec2BertModel", "rotary, base 100", _ROTARY | {"rotary_embedding_base": 100}),
    Variant("Wav2Vec2BertModel", "no positions", {"position_embeddings_type": None}),
    Variant("Wav2Vec2BertModel", "activations", {"hidden_act": "gelu", "layer_norm_eps": 1e-2}),
    Variant("Wav2Vec2BertModel", "masked frames", mask_time_indices=True),
    Variant("Wav2Vec2BertModel", "masked frames without SpecAugment", {"apply_spec_augment": False}, None, True),
    Variant("Wav2Vec2BertModel", "no mask embedding", _NO_MASKS),
    Variant("Wav2Vec2BertModel", "adapter", _ADAPTER),
    Variant("Wav2Vec2BertModel", "adapter of two layers", _TWO_LAYERS | {"adapter_act": "gelu"}),
    Variant("Wav2Vec2BertModel", "adapter of three layers", _ADAPTER | {"num_adapter_layers": 3}, lengths=(24, 17)),
    Variant("Wav2Vec2BertModel", "adapter, other output size", _TWO_LAYERS | {"output_hidden_size": 8}),
    Variant("Wav2Vec2BertModel", "adapter, kernel 2", _ADAPTER | {"adapter_kernel_size": 2}),
    Variant(
        "Wav2Vec2BertModel", "adapter, kernel 5, stride 4", _ADAPTER | {"adapter_kernel_size": 5, "adapter_stride": 4}
    ),
    Variant("Wav2Vec2BertModel", "feed-forward before the adapter", _FEED_FORWARD),
    Variant("Wav2Vec2BertModel", "one item, even length", lengths=(8,)),
    Variant("Wav2Vec2BertModel", "relative, two items", {"position_embeddings_type": "relative"}, lengths=(1, 6)),
    Variant("Wav2Vec2BertForCTC", "sum", {}, "ctc"),
    Variant("Wav2Vec2BertForCTC", "mean", {"ctc_loss_reduction": "mean", "pad_token_id": 6}, "ctc"),
    Variant("Wav2Vec2BertForCTC", "relative", {"position_embeddings_type": "relative"}, "ctc"),
    Variant("Wav2Vec2BertForCTC", "rotary", _ROTARY, "ctc"),
    Variant("Wav2Vec2BertForCTC", "no positions", {"position_embeddings_type": None}, "ctc"),
    Variant("Wav2Vec2BertForCTC", "adapter", _FEED_FORWARD | _TWO_LAYERS | {"output_hidden_size": 16}, "ctc"),
    Variant(
        "Wav2Vec2BertForCTC",
        "mean, infeasible items are zero",
        _TWO_LAYERS | {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True},
        "ctc",
        lengths=(13, 3, 6),
    ),
    Variant(
        "Wav2Vec2BertForCTC",
        "sum, infeasible items are zero",
        _TWO_LAYERS | {"ctc_zero_infinity": True},
        "ctc",
        lengths=(13, 3, 6),
    ),
)
