"""Vocabularies from transcripts."""

import unicodedata
from collections import Counter
from collections.abc import Iterable

#: The first ids of every vocabulary that is built here: padding (the CTC blank), sentence marks, unknown, word border.
SPECIAL_SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>", "|")


def build_vocabulary(texts: Iterable[str], *, min_count: int = 1) -> dict[str, int]:
    """Ids of the characters in ``texts``: :data:`SPECIAL_SYMBOLS`, then characters by code point.

    Args:
        texts: Normalised transcripts; white space separates words and gets the id of ``|``.
        min_count: Rarer characters are left out.

    Raises:
        ValueError: when the transcripts hold ``|``, which stands for the border of words, or nothing at all.
    """
    counts = Counter(character for text in texts for character in unicodedata.normalize("NFC", text))
    characters = sorted(character for character in counts if not character.isspace())
    if "|" in characters:
        raise ValueError("transcripts hold '|', which stands for the border of words; remove or replace it")
    if not characters:
        raise ValueError("the transcripts hold no characters, so there is no vocabulary")
    kept = [character for character in characters if counts[character] >= min_count]
    return {symbol: index for index, symbol in enumerate((*SPECIAL_SYMBOLS, *kept))}
