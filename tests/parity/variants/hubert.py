"""HuBERT: the bare model, then with its heads."""

from ..variant import Variant

_STABLE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}

VARIANTS = (
    Variant("HubertModel", "group norm"),
    Variant("HubertModel", "layer norm without bias", {"feat_extract_norm": "layer"}),
    Variant("HubertModel", "stable", _STABLE, differs_in_5=True),
    Variant("HubertModel", "stable with language adapter", _STABLE | {"adapter_attn_dim": 5}, differs_in_5=True),
    Variant("HubertModel", "language adapter without effect", {"adapter_attn_dim": 5}),
    Variant(
        "HubertModel",
        "odd positional kernel and no projection norm",
        {"conv_bias": True, "feat_proj_layer_norm": False, "num_conv_pos_embeddings": 5},
    ),
    Variant(
        "HubertModel",
        "other convolutions and epsilon",
        {"conv_dim": (6, 9, 7, 10), "conv_kernel": (3, 5, 1, 2), "conv_stride": (5, 2, 2, 2), "layer_norm_eps": 1e-2},
    ),
    Variant("HubertModel", "masked frames", mask_time_indices=True),
    Variant("HubertModel", "masked frames without SpecAugment", {"apply_spec_augment": False}, None, True),
    Variant("HubertForCTC", "sum", {"add_adapter": True, "output_hidden_size": 12}, "ctc"),
    Variant("HubertForCTC", "mean stable", _STABLE | {"ctc_loss_reduction": "mean"}, "ctc", differs_in_5=True),
)
