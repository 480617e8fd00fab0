"""Heads of Wav2Vec2-BERT other than CTC."""

VARIANTS = ()
