"""Wav2Vec2-BERT: the bare model, then with CTC."""

from ..variant import Variant

_ADAPTER = {"add_adapter": True}

VARIANTS = (
    Variant("Wav2Vec2BertModel", "relative_key"),
    Variant("Wav2Vec2BertModel", "relative", {"position_embeddings_type": "relative"}),
    Variant("Wav2Vec2BertModel", "rotary", {"position_embeddings_type": "rotary"}),
    Variant("Wav2Vec2BertModel", "no positions", {"position_embeddings_type": None}),
    Variant("Wav2Vec2BertModel", "masked frames", mask_time_indices=True),
    Variant("Wav2Vec2BertModel", "masked frames without SpecAugment", {"apply_spec_augment": False}, None, True),
    Variant("Wav2Vec2BertModel", "adapter", _ADAPTER),
    Variant("Wav2Vec2BertForCTC", "sum", {}, "ctc"),
)
