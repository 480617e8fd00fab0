"""The character tokenizer of CTC models, with the file formats and the quirks of Transformers."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY_FILE = "vocab.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
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


class Wav2Vec2CTCTokenizer:
    """Characters to ids, and frame-wise ids to text.

    As in Transformers: ``do_lower_case`` spells in capitals before encoding and in small letters after decoding;
    vocabulary entries of several characters are encoded as a whole and swallow the spaces around them; special tokens
    that the vocabulary lacks get ids after it, and swallow nothing. Other than there, the unknown token among these
    stands for unknown characters too.

    Args:
        vocab: Ids by symbol, by language and symbol, or the path of a ``vocab.json`` with either.
        bos_token: Begin of sentence.
        eos_token: End of sentence.
        unk_token: Stands for symbols outside the vocabulary.
        pad_token: Padding, and the blank of CTC.
        word_delimiter_token: Stands for the space between words.
        replace_word_delimiter_char: What it becomes in decoded text.
        do_lower_case: See above.
        target_lang: Language of a vocabulary by language.
        clean_up_tokenization_spaces: Join English punctuation to the word before it when decoding.

    Raises:
        ValueError: when the file is no vocabulary, or the language is missing.
    """

    def __init__(
        self,
        vocab: dict[str, Any] | str | Path,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        pad_token: str = "<pad>",
        word_delimiter_token: str = "|",
        replace_word_delimiter_char: str = " ",
        do_lower_case: bool = False,
        target_lang: str | None = None,
        clean_up_tokenization_spaces: bool = True,
    ):
        self.vocab = vocab if isinstance(vocab, dict) else _read_vocabulary(Path(vocab))
        self.bos_token, self.eos_token = bos_token, eos_token
        self.unk_token, self.pad_token = unk_token, pad_token
        self.word_delimiter_token = word_delimiter_token
        self.replace_word_delimiter_char = replace_word_delimiter_char
        self.do_lower_case = do_lower_case
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.target_lang = target_lang
        nested = any(isinstance(value, dict) for value in self.vocab.values())
        if nested and target_lang is None:
            raise ValueError(f"the vocabulary is by language; choose target_lang from {', '.join(self.vocab)}")
        if target_lang is not None:
            self.set_target_lang(target_lang)
        else:
            self._use(self.vocab)

    def set_target_lang(self, target_lang: str) -> None:
        """Change the language of a vocabulary by language.

        Raises:
            ValueError: when the vocabulary is of one language, or lacks this one.
        """
        if not all(isinstance(value, dict) for value in self.vocab.values()):
            raise ValueError(f"the vocabulary is of one language; target_lang {target_lang!r} cannot be set")
        if target_lang not in self.vocab:
            raise ValueError(f"the vocabulary has no language {target_lang!r}; choose from {', '.join(self.vocab)}")
        self.target_lang = target_lang
        self._use(self.vocab[target_lang])

    def _use(self, encoder: dict[str, Any]) -> None:
        wrong = next((symbol for symbol, index in encoder.items() if not isinstance(index, int) or index < 0), None)
        if wrong is not None:
            raise ValueError(f"the vocabulary maps {wrong!r} to {encoder[wrong]!r}, which is no id")
        self._encoder = dict(encoder)
        self._ids = dict(encoder)
        for name in _SPECIAL:
            token = getattr(self, name)
            if token is not None and token not in self._ids:
                self._ids[token] = max(len(self._ids), max(self._ids.values(), default=-1) + 1)
        self._symbols = {index: symbol for symbol, index in self._ids.items()}
        whole = sorted((symbol for symbol in self._ids if len(symbol) > 1), key=len, reverse=True)
        self._whole = re.compile("(" + "|".join(map(re.escape, whole)) + ")") if whole else None

    def __len__(self) -> int:
        """Number of symbols, special tokens outside the vocabulary included."""
        return len(self._ids)

    @property
    def vocab_size(self) -> int:
        """Number of symbols in the vocabulary itself."""
        return len(self._encoder)

    def get_vocab(self) -> dict[str, int]:
        """Ids by symbol, special tokens included."""
        return dict(self._ids)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Id of a symbol; that of the unknown token for one that is not there."""
        return self._ids.get(token, self._ids.get(self.unk_token))

    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str]:
        """Symbols of ``ids``; the unknown token for ids that do not exist."""
        special = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._symbols.get(int(index), self.unk_token) for index in ids if int(index) not in special]

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return [self._ids[getattr(self, name)] for name in _SPECIAL if getattr(self, name) is not None]

    @property
    def pad_token_id(self) -> int:
        """Id of padding and of the CTC blank."""
        return self._ids[self.pad_token]

    @property
    def unk_token_id(self) -> int:
        """Id of the unknown token."""
        return self._ids[self.unk_token]

    @property
    def bos_token_id(self) -> int | None:
        """Id of the begin of a sentence."""
        return self._ids.get(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end of a sentence."""
        return self._ids.get(self.eos_token)

    @property
    def word_delimiter_token_id(self) -> int | None:
        """Id of the border between words."""
        return self.convert_tokens_to_ids(self.word_delimiter_token)

    def tokenize(self, text: str) -> list[str]:
        """Symbols that spell ``text``, not all of which need be in the vocabulary."""
        pieces = self._whole.split(text) if self._whole else [text]
        symbols: list[str] = []
        for position, piece in enumerate(pieces):
            if position % 2:  # a vocabulary entry of several characters
                symbols.append(piece)
                continue
            if position > 0 and pieces[position - 1] in self._encoder:
                piece = piece.lstrip()
            if position < len(pieces) - 1 and pieces[position + 1] in self._encoder:
                piece = piece.rstrip()
            if self.do_lower_case:
                piece = piece.lower().upper()
            symbols.extend(piece.replace(" ", self.word_delimiter_token))
        return symbols

    def encode(self, text: str) -> list[int]:
        """Ids that spell ``text``; no marks of begin or end are added."""
        return [self.convert_tokens_to_ids(symbol) for symbol in self.tokenize(text)]

    def __call__(
        self, text: str | Sequence[str], *, padding: bool | str = False, return_tensors: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` of a text or of several.

        Args:
            text: One text or several.
            padding: Pad several to the longest.
            return_tensors: ``"np"`` or ``"jax"`` for arrays instead of lists.
        """
        if isinstance(text, str):
            ids = self.encode(text)
            features: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            if return_tensors is None:
                return features
            return _as_arrays({name: [values] for name, values in features.items()}, return_tensors)
        return self.pad(
            {"input_ids": [self.encode(one) for one in text]}, padding=padding, return_tensors=return_tensors
        )

    def pad(
        self,
        encoded: dict[str, Any] | Sequence[dict[str, Any]],
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Pad lists of ids on the right with the padding token, and mask what is padded.

        Args:
            encoded: ``{"input_ids": [[...], ...]}`` or a sequence of ``{"input_ids": [...]}``.
            padding: To the longest (``True``, ``"longest"``), to ``max_length`` (``"max_length"``), or not at all.
            max_length: See above.
            pad_to_multiple_of: Rounds the padded length up.
            return_tensors: ``"np"`` or ``"jax"`` for arrays instead of lists.
        """
        rows = encoded["input_ids"] if isinstance(encoded, dict) else [item["input_ids"] for item in encoded]
        rows = [list(row) for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding and padding != "do_not_pad":
            length = max(map(len, rows), default=0)
            if padding == "max_length" and max_length is not None:
                length = max_length
            if pad_to_multiple_of:
                length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
            rows, masks = (
                [row + [filler] * (length - len(row)) for row in lists]
                for lists, filler in ((rows, self.pad_token_id), (masks, 0))
            )
        features = {"input_ids": rows, "attention_mask": masks}
        return features if return_tensors is None else _as_arrays(features, return_tensors)

    def decode(
        self,
        token_ids: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        group_tokens: bool = True,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> str | Wav2Vec2CTCTokenizerOutput:
        """Text of frame-wise ids: runs are collapsed, blanks removed.

        Args:
            token_ids: Best id per frame, or label ids.
            skip_special_tokens: Remove special tokens, the blank among them, *before* runs are collapsed: wrong for
                frame-wise ids, as in Transformers.
            clean_up_tokenization_spaces: Default: as the tokenizer was made.
            group_tokens: Collapse runs; ``False`` for label ids.
            output_char_offsets: Return where characters lie, in frames.
            output_word_offsets: Return where words lie, in frames.
        """
        ids = np.asarray(token_ids).reshape(-1).tolist() if not isinstance(token_ids, list) else token_ids
        symbols = self.convert_ids_to_tokens(ids, skip_special_tokens)
        offsets = self._character_offsets(symbols, group_tokens)
        text = "".join(offset["char"] for offset in offsets).strip()
        if self.do_lower_case:
            text = text.lower()
        clean_up = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        for pattern, joined in _CLEAN_UP if clean_up else ():
            text = text.replace(pattern, joined)
        if not (output_char_offsets or output_word_offsets):
            return text
        words = _word_offsets(offsets, self.replace_word_delimiter_char) if output_word_offsets else None
        return Wav2Vec2CTCTokenizerOutput(text, offsets if output_char_offsets else None, words)

    def batch_decode(
        self, sequences: Iterable[Any], skip_special_tokens: bool = False, **options: Any
    ) -> list[str] | Wav2Vec2CTCTokenizerOutput:
        """:meth:`decode` for every sequence; offsets come as lists in one output."""
        decoded = [self.decode(sequence, skip_special_tokens, **options) for sequence in sequences]
        if not decoded or isinstance(decoded[0], str):
            return decoded
        characters, words = ([getattr(one, name) for one in decoded] for name in ("char_offsets", "word_offsets"))
        return Wav2Vec2CTCTokenizerOutput(
            [one.text for one in decoded],
            characters if options.get("output_char_offsets") else None,
            words if options.get("output_word_offsets") else None,
        )

    def _character_offsets(self, symbols: list[str], group_tokens: bool) -> list[dict[str, Any]]:
        runs = (
            ((symbol, sum(1 for _ in run)) for symbol, run in itertools.groupby(symbols))
            if group_tokens
            else ((symbol, 1) for symbol in symbols)
        )
        offsets, position = [], 0
        for symbol, length in runs:
            if symbol != self.pad_token:
                character = self.replace_word_delimiter_char if symbol == self.word_delimiter_token else symbol
                offsets.append({"char": character, "start_offset": position, "end_offset": position + length})
            position += length
        return offsets

    @classmethod
    def from_pretrained(cls, directory_or_hub_id: str | Path, **changes: Any) -> "Wav2Vec2CTCTokenizer":
        """The tokenizer in a directory or on the hub.

        Args:
            directory_or_hub_id: Where ``vocab.json`` lies, and ``tokenizer_config.json`` beside it.
            changes: Constructor arguments that replace what the files say.

        Raises:
            FileNotFoundError: when there is no ``vocab.json``.
        """
        from speech_flax.pretrained import pretrained_directory

        directory = pretrained_directory(directory_or_hub_id)
        path = directory / VOCABULARY_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {directory_or_hub_id} holds no CTC tokenizer")
        config: dict[str, Any] = {}
        for name in (SPECIAL_TOKENS_FILE, CONFIG_FILE):
            if (directory / name).is_file():
                config |= json.loads((directory / name).read_text(encoding="utf-8"))
        known = ("word_delimiter_token", "replace_word_delimiter_char", "do_lower_case", "target_lang")
        known += (*_SPECIAL, "clean_up_tokenization_spaces")
        options = {name: _content(config[name]) for name in known if config.get(name) is not None}
        return cls(path, **(options | changes))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files that Transformers reads, into ``directory``, which is made if it does not exist."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        special = {name: getattr(self, name) for name in _SPECIAL}
        config = special | {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "processor_class": "Wav2Vec2BertProcessor",
            "word_delimiter_token": self.word_delimiter_token,
            "replace_word_delimiter_char": self.replace_word_delimiter_char,
            "do_lower_case": self.do_lower_case,
            "target_lang": self.target_lang,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
        }
        for name, content in ((VOCABULARY_FILE, self.vocab), (SPECIAL_TOKENS_FILE, special), (CONFIG_FILE, config)):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (directory / name).write_text(text, encoding="utf-8")


def _read_vocabulary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such vocabulary file")
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError(f"{path} does not map symbols to ids")
    return vocabulary


def _content(token: Any) -> Any:
    """A token that Transformers may have saved with its options around it."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def _word_offsets(characters: list[dict[str, Any]], delimiter: str) -> list[dict[str, Any]]:
    words = []
    for is_space, run in itertools.groupby(characters, key=lambda offset: offset["char"] == delimiter):
        if not is_space:
            spelled = list(run)
            word = "".join(offset["char"] for offset in spelled)
            words.append(
                {"word": word, "start_offset": spelled[0]["start_offset"], "end_offset": spelled[-1]["end_offset"]}
            )
    return words


def _as_arrays(features: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind not in ("np", "jax"):
        raise ValueError(f"return_tensors must be 'np' or 'jax', not {kind!r}")
    arrays = {name: np.asarray(values) for name, values in features.items()}
    if kind == "jax":
        import jax.numpy as jnp

        arrays = {name: jnp.asarray(values) for name, values in arrays.items()}
    return arrays
