"""From the symbols of frames to text: runs collapsed, blanks removed, and where characters and words lie."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

#: What English text clean-up joins: (pattern, replacement), in this order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"))
_CLEAN_UP += ((" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


@dataclasses.dataclass(frozen=True)
class Wav2Vec2CTCTokenizerOutput:
    """Decoded text, and where characters and words lie, in frames, if asked for.

    ``char_offsets`` holds ``{"char", "start_offset", "end_offset"}``, ``word_offsets`` the same with ``"word"``; lists
    of lists for a batch.
    """

    text: str | list[str]
    char_offsets: list | None = None
    word_offsets: list | None = None


def character_offsets(
    symbols: Sequence[str | None], *, blank: str | None, spellings: dict[str, str], group: bool
) -> list[dict[str, Any]]:
    """Characters and the frames that they take.

    Args:
        symbols: One per frame; ``None`` where there is none.
        blank: What is left out.
        spellings: What other symbols become in text.
        group: Collapse runs of one symbol.
    """
    runs = (
        ((symbol, sum(1 for _ in run)) for symbol, run in itertools.groupby(symbols))
        if group
        else ((symbol, 1) for symbol in symbols)
    )
    offsets, position = [], 0
    for symbol, length in runs:
        if symbol is not None and symbol != blank:
            character = spellings.get(symbol, symbol)
            offsets.append({"char": character, "start_offset": position, "end_offset": position + length})
        position += length
    return offsets


def word_offsets(characters: Sequence[dict[str, Any]], delimiter: str) -> list[dict[str, Any]]:
    """Words and the frames from their first to their last character; ``delimiter`` is what lies between them."""
    words = []
    for is_space, run in itertools.groupby(characters, key=lambda offset: offset["char"] == delimiter):
        if not is_space:
            spelled = list(run)
            word = "".join(offset["char"] for offset in spelled)
            words.append(
                {"word": word, "start_offset": spelled[0]["start_offset"], "end_offset": spelled[-1]["end_offset"]}
            )
    return words


def cleaned_up(text: str) -> str:
    """``text`` with English punctuation joined to the word before it."""
    for pattern, joined in _CLEAN_UP:
        text = text.replace(pattern, joined)
    return text
