"""Transcripts as a model should learn to write them."""

import unicodedata
from typing import Literal


def normalize_transcript(
    text: str,
    *,
    case: Literal["lower", "upper", "keep"] = "lower",
    punctuation: Literal["remove", "keep"] = "remove",
    keep_characters: str = "'",
) -> str:
    """Compose accents (Unicode NFC), set the letter case, and collapse white space.

    Args:
        text: Transcript in any language.
        case: Letter case of the result.
        punctuation: Whether punctuation and symbols (Unicode categories P and S) become spaces.
        keep_characters: Punctuation that stays when the rest is removed.
    """
    text = unicodedata.normalize("NFC", text).replace("\u2019", "'")
    if punctuation == "remove":
        text = "".join(
            " " if unicodedata.category(character)[0] in "PS" and character not in keep_characters else character
            for character in text
        )
    if case != "keep":
        text = text.lower() if case == "lower" else text.upper()
    return " ".join(unicodedata.normalize("NFC", text).split())
