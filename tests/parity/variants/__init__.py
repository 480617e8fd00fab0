"""All variants, from the bottom up."""

from . import heads, hubert, wav2vec2_bert

VARIANTS = (*wav2vec2_bert.VARIANTS, *hubert.VARIANTS, *heads.VARIANTS)
