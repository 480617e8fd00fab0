"""HuBERT: the bare model, then with its heads."""

VARIANTS = ()
