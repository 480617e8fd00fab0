"""The character tokenizer of CTC models, with the file formats and the quirks of Transformers."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speech_flax.text.decoding import Wav2Vec2CTCTokenizerOutput, character_offsets, cleaned_up, word_offsets
from speech_flax.text.padding import cut_length, padded
from speech_flax.text.tokenizer_files import (
    SPECIAL_TOKENS,
    VOCABULARY_FILE,
    AddedToken,
    read_arguments,
    read_vocabulary,
    write_files,
)


class Wav2Vec2CTCTokenizer:
    """Characters to ids, and frame-wise ids to text.

    As in Transformers: ``do_lower_case`` spells in capitals before encoding and in small letters after decoding;
    vocabulary entries of several characters are encoded as a whole and swallow the spaces around them; so are tokens
    that were added to the vocabulary, which swallow what they say, and special tokens, which swallow nothing and, if
    nothing else gives them an id, get one after all others. Other than there, the unknown token among these stands for
    unknown characters too.

    Args:
        vocab: Ids by symbol, by language and symbol, or the path of a ``vocab.json`` with either.
        bos_token: Begin of sentence; ``None`` for no such token, here and below.
        eos_token: End of sentence.
        unk_token: Stands for symbols outside the vocabulary.
        pad_token: Padding, and the blank of CTC.
        word_delimiter_token: Stands for the space between words.
        replace_word_delimiter_char: What it becomes in decoded text.
        do_lower_case: See above.
        target_lang: Language of a vocabulary by language.
        clean_up_tokenization_spaces: Join English punctuation to the word before it when decoding.
        added_tokens: Tokens beside the vocabulary. Those that a vocabulary by language contradicts are left out.
        additional_special_tokens: More tokens that decoding can skip.

    Raises:
        ValueError: when the file is no vocabulary, the language is missing, or an added token has the id of another
            symbol, or another id than in the vocabulary.
    """

    def __init__(
        self,
        vocab: dict[str, Any] | str | Path,
        bos_token: str | None = "<s>",
        eos_token: str | None = "</s>",
        unk_token: str | None = "<unk>",
        pad_token: str | None = "<pad>",
        word_delimiter_token: str = "|",
        replace_word_delimiter_char: str = " ",
        do_lower_case: bool = False,
        target_lang: str | None = None,
        clean_up_tokenization_spaces: bool = True,
        added_tokens: Sequence[AddedToken] = (),
        additional_special_tokens: Sequence[str] = (),
    ):
        self.vocab = vocab if isinstance(vocab, dict) else read_vocabulary(Path(vocab))
        self.bos_token, self.eos_token = bos_token, eos_token
        self.unk_token, self.pad_token = unk_token, pad_token
        self.word_delimiter_token = word_delimiter_token
        self.replace_word_delimiter_char = replace_word_delimiter_char
        self.do_lower_case = do_lower_case
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.target_lang = target_lang
        self.added_tokens = tuple(added_tokens)
        self.additional_special_tokens = tuple(additional_special_tokens)
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
        added = list(self._fitting_tokens())
        self._ids = self._encoder | {token.content: token.id for token in added}
        self._symbols = {token.id: token.content for token in added}
        for token in self.all_special_tokens:
            if token not in self._ids:
                self._ids[token] = max(len(self._ids), max(self._ids.values(), default=-1) + 1)
        self._symbols |= {index: symbol for symbol, index in self._ids.items()}
        strips = dict.fromkeys(self.all_special_tokens, (False, False))
        strips |= {token.content: (token.lstrip, token.rstrip) for token in added}
        strips |= {symbol: (True, True) for symbol in self._encoder if len(symbol) > 1}
        self._strips = strips
        whole = sorted(filter(None, strips), key=len, reverse=True)
        self._whole = re.compile("(" + "|".join(map(re.escape, whole)) + ")") if whole else None

    def _fitting_tokens(self) -> Iterator[AddedToken]:
        """The added tokens, checked against the vocabulary."""
        symbols = {index: symbol for symbol, index in self._encoder.items()}
        for token in self.added_tokens:
            known = self._encoder.get(token.content, token.id), symbols.get(token.id, token.content)
            if known == (token.id, token.content):
                yield token
            elif self.target_lang is None:
                raise ValueError(
                    f"{token.content!r} was added with the id {token.id}, but the vocabulary has {known[1]!r} with the "
                    f"id {known[0]}; remove either from the tokenizer's files"
                )

    def __len__(self) -> int:
        """Number of symbols, those outside the vocabulary included."""
        return len(self._ids)

    @property
    def vocab_size(self) -> int:
        """Number of symbols in the vocabulary itself."""
        return len(self._encoder)

    def get_vocab(self) -> dict[str, int]:
        """Ids by symbol, those outside the vocabulary included."""
        return dict(self._ids)

    def convert_tokens_to_ids(self, token: str | None) -> int | None:
        """Id of a symbol; that of the unknown token for one that is not there."""
        return self._ids.get(token, self._ids.get(self.unk_token))

    def convert_ids_to_tokens(self, ids: Iterable[Any], skip_special_tokens: bool = False) -> list[str | None]:
        """Symbols of ``ids``; the unknown token for ids that do not exist."""
        special = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._symbols.get(int(index), self.unk_token) for index in ids if int(index) not in special]

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens: those with a role, and the additional ones."""
        named = (getattr(self, name) for name in SPECIAL_TOKENS)
        return list(dict.fromkeys([token for token in named if token is not None] + [*self.additional_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return [self._ids[token] for token in self.all_special_tokens]

    @property
    def pad_token_id(self) -> int | None:
        """Id of padding and of the CTC blank."""
        return self._ids.get(self.pad_token)

    @property
    def unk_token_id(self) -> int | None:
        """Id of the unknown token."""
        return self._ids.get(self.unk_token)

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
            if position % 2:  # what is spelled as a whole
                symbols.append(piece)
                continue
            if position > 0 and self._strips[pieces[position - 1]][1]:
                piece = piece.lstrip()
            if position < len(pieces) - 1 and self._strips[pieces[position + 1]][0]:
                piece = piece.rstrip()
            if self.do_lower_case:
                piece = piece.lower().upper()
            symbols.extend(piece.replace(" ", self.word_delimiter_token))
        return symbols

    def encode(self, text: str) -> list[int]:
        """Ids that spell ``text``; no marks of begin or end are added.

        Raises:
            ValueError: for a symbol outside the vocabulary if there is no unknown token.
        """
        symbols = self.tokenize(text)
        ids = [self.convert_tokens_to_ids(symbol) for symbol in symbols]
        if None in ids:
            raise ValueError(f"{symbols[ids.index(None)]!r} is not in the vocabulary, and there is no unk_token")
        return ids

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` of a text or of several.

        Args:
            text: One text or several.
            padding: See :meth:`pad`.
            truncation: Cut rows to ``max_length`` ids; default: if there is one and nothing is padded.
            max_length: Ids to cut to or, with the padding ``"max_length"``, to pad to.
            pad_to_multiple_of: Rounds the padded length up.
            return_attention_mask: Whether to return the mask.
            return_tensors: ``"np"`` or ``"jax"`` for arrays instead of lists; one text makes a batch of one.

        Raises:
            ValueError: for a value that is none of these, or rows of unequal length without padding into one array.
        """
        cut = cut_length(truncation, padding, max_length, pad_to_multiple_of)
        rows = [self.encode(one)[:cut] for one in ([text] if isinstance(text, str) else text)]
        alone = isinstance(text, str) and return_tensors is None
        return self.pad(
            {"input_ids": rows[0] if alone else rows},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def pad(
        self,
        encoded: dict[str, Any] | Sequence[dict[str, Any]],
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Pad lists of ids on the right with the padding token, and mask what is padded.

        Args:
            encoded: ``{"input_ids": [[...], ...]}`` or a sequence of ``{"input_ids": [...]}``, or one such row; with an
                ``"attention_mask"`` or without.
            padding: To the longest (``True``, ``"longest"``), to ``max_length`` (``"max_length"``), or not at all.
            max_length: See above; longer rows stay as they are.
            pad_to_multiple_of: Rounds the padded length up.
            return_attention_mask: Whether to return the mask.
            return_tensors: ``"np"`` or ``"jax"`` for arrays instead of lists.

        Raises:
            ValueError: for a value that is none of these, without a padding token, or for rows of unequal length in one
                array.
        """
        return padded(
            encoded,
            self.pad_token_id,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

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
        spellings = {self.word_delimiter_token: self.replace_word_delimiter_char}
        offsets = character_offsets(symbols, blank=self.pad_token, spellings=spellings, group=group_tokens)
        text = "".join(offset["char"] for offset in offsets).strip()
        if self.do_lower_case:
            text = text.lower()
        clean_up = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        if clean_up:
            text = cleaned_up(text)
        if not (output_char_offsets or output_word_offsets):
            return text
        words = word_offsets(offsets, self.replace_word_delimiter_char) if output_word_offsets else None
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

    @classmethod
    def from_pretrained(cls, directory_or_hub_id: str | Path, **changes: Any) -> "Wav2Vec2CTCTokenizer":
        """The tokenizer in a directory or on the hub.

        Args:
            directory_or_hub_id: Where ``vocab.json`` lies, and ``tokenizer_config.json`` beside it.
            changes: Constructor arguments that replace what the files say.

        Raises:
            FileNotFoundError: when there is no ``vocab.json``.
            ValueError: when a file is damaged, or an added token cannot be used as Transformers uses it.
        """
        from speech_flax.pretrained import pretrained_directory

        directory = pretrained_directory(directory_or_hub_id)
        path = directory / VOCABULARY_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {directory_or_hub_id} holds no CTC tokenizer")
        return cls(path, **(read_arguments(directory) | changes))

    def save_pretrained(self, directory: str | Path, *, processor_class: str | None = None) -> None:
        """Write the files that Transformers reads.

        Args:
            directory: It is made if it does not exist.
            processor_class: Name of the processor that this is a part of.
        """
        config: dict[str, Any] = {name: getattr(self, name) for name in SPECIAL_TOKENS}
        if self.additional_special_tokens:
            config["additional_special_tokens"] = list(self.additional_special_tokens)
        if self.added_tokens:
            config["added_tokens_decoder"] = {
                str(token.id): {name: value for name, value in dataclasses.asdict(token).items() if name != "id"}
                for token in self.added_tokens
            }
        if processor_class is not None:
            config["processor_class"] = processor_class
        config |= {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "word_delimiter_token": self.word_delimiter_token,
            "replace_word_delimiter_char": self.replace_word_delimiter_char,
            "do_lower_case": self.do_lower_case,
            "target_lang": self.target_lang,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
        }
        write_files(Path(directory), self.vocab, config)
