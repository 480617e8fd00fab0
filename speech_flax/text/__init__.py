"""Transcripts: tokenizer, vocabulary, normalisation."""
