"""HuBERT and Wav2Vec2-BERT in JAX and Flax.

Names are imported on first use, so that ``import speech_flax`` stays light.
"""

import importlib
from typing import Any

_HOMES = {
    "HubertConfig": "configuration",
    "AutoModel": "pretrained",
    "HubertModel": "models.hubert",
    "HubertForCTC": "models.hubert",
    "HubertForSequenceClassification": "models.hubert_heads",
    "Wav2Vec2BertConfig": "configuration",
    "Wav2Vec2BertModel": "models.wav2vec2_bert",
    "Wav2Vec2BertForCTC": "models.wav2vec2_bert",
    "Wav2Vec2BertForSequenceClassification": "models.wav2vec2_bert_heads",
    "Wav2Vec2BertForAudioFrameClassification": "models.wav2vec2_bert_heads",
    "Wav2Vec2BertForXVector": "models.wav2vec2_bert_heads",
    "SeamlessM4TFeatureExtractor": "audio.feature_extraction",
    "Wav2Vec2FeatureExtractor": "audio.waveform_extraction",
    "Wav2Vec2CTCTokenizer": "text.tokenizer",
    "Wav2Vec2Processor": "processing",
    "Wav2Vec2BertProcessor": "processing",
    "ctc_loss": "losses",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'speech_flax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"speech_flax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
