"""The tensors that Transformers 4.37.2 wants in a file, by model, head and variant: ``python tests/conversion_keys.py``

Run by a Python that has Transformers 4.37.2, it writes ``conversion_keys.json``; it needs neither JAX nor this library.
"""

import json
import sys
from pathlib import Path

from conversion_fixtures import ADAPTER, HUBERT, LARGE, MODELS, WAV2VEC2_BERT

KEYS = Path(__file__).with_suffix(".json")
_NO_SPEC_AUGMENT = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
#: Architecture and fields by name: the matrix, but for what 4.37.2 does not have, and what differs in names alone.
VARIANTS = {
    **{name: model for name, model in MODELS.items() if name != "hubert batch norm"},
    "w2v-bert no positions": ("Wav2Vec2BertModel", {**WAV2VEC2_BERT, "position_embeddings_type": None}),
    "w2v-bert no mask": ("Wav2Vec2BertModel", {**WAV2VEC2_BERT, **_NO_SPEC_AUGMENT}),
    "w2v-bert ctc": ("Wav2Vec2BertForCTC", WAV2VEC2_BERT),
    "w2v-bert relative adapter ctc": (
        "Wav2Vec2BertForCTC",
        {**WAV2VEC2_BERT, **ADAPTER, "position_embeddings_type": "relative"},
    ),
    "w2v-bert sequence, last layer": ("Wav2Vec2BertForSequenceClassification", WAV2VEC2_BERT),
    "w2v-bert frames, weighted": (
        "Wav2Vec2BertForAudioFrameClassification",
        {**WAV2VEC2_BERT, "use_weighted_layer_sum": True},
    ),
    "w2v-bert speaker, weighted": ("Wav2Vec2BertForXVector", {**WAV2VEC2_BERT, "use_weighted_layer_sum": True}),
    "w2v-bert speaker, adapter": ("Wav2Vec2BertForXVector", {**WAV2VEC2_BERT, "add_adapter": True}),
    "hubert no mask": ("HubertModel", {**HUBERT, **_NO_SPEC_AUGMENT}),
    "hubert no projection norm": ("HubertModel", {**HUBERT, "feat_proj_layer_norm": False}),
    "hubert group norm with bias": ("HubertModel", {**HUBERT, "conv_bias": True}),
    "hubert layer norm without bias": ("HubertModel", {**HUBERT, **LARGE, "conv_bias": False}),
    "hubert sequence, last layer": ("HubertForSequenceClassification", {**HUBERT, **LARGE}),
}


def main() -> None:
    import transformers

    if transformers.__version__ != "4.37.2":
        sys.exit(f"the names are those of Transformers 4.37.2, not of {transformers.__version__}")
    lines = []
    for name, (architecture, fields) in VARIANTS.items():
        model_class = getattr(transformers, architecture)
        state = model_class(model_class.config_class(**fields)).state_dict()
        shapes = {key: list(tensor.shape) for key, tensor in sorted(state.items())}
        lines.append(f"{json.dumps(name)}: {json.dumps(shapes, separators=(',', ':'))}")
    KEYS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
