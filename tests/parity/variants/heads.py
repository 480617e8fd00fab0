"""Heads other than CTC."""

from ..variant import Variant

_WEIGHTED = {"use_weighted_layer_sum": True}
_ADAPTER = {"add_adapter": True, "tdnn_kernel": (2, 1, 1)}  # the shortest item has three frames left

VARIANTS = (
    Variant("Wav2Vec2BertForSequenceClassification", "last layer", {}, "classes"),
    Variant("Wav2Vec2BertForSequenceClassification", "weighted layers", _WEIGHTED, "classes"),
    Variant("Wav2Vec2BertForAudioFrameClassification", "last layer", {}, "frames"),
    Variant("Wav2Vec2BertForAudioFrameClassification", "weighted layers", _WEIGHTED, "frames"),
    Variant("Wav2Vec2BertForXVector", "last layer", {}, "classes"),
    Variant("Wav2Vec2BertForXVector", "weighted layers", _WEIGHTED, "classes"),
    Variant("Wav2Vec2BertForXVector", "adapter", _ADAPTER, "classes"),
    Variant("HubertForSequenceClassification", "last layer", {}, "classes"),
    Variant("HubertForSequenceClassification", "weighted layers", _WEIGHTED, "classes"),
    Variant(
        "HubertForSequenceClassification",
        "weighted layers of pre-norm",
        _WEIGHTED | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        "classes",
        differs_in_5=True,
    ),
)
