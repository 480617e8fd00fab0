"""What a CTC tokenizer is asked; the answers of Transformers 4.37.2 are stored in ``references/tokenizer.json``."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .variant import REFERENCES

REFERENCE = REFERENCES / "tokenizer.json"

_SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "A", "O", "H", "L", "'", "<lang>", "S", "N")
VOCABULARY = {symbol: index for index, symbol in enumerate(_SYMBOLS)}

#: Constructor arguments, vocabulary included, by name.
TOKENIZERS: dict[str, dict[str, Any]] = {
    "plain": {"vocab": VOCABULARY},
    "lower case": {"vocab": VOCABULARY, "do_lower_case": True},
    "no clean-up": {"vocab": VOCABULARY, "clean_up_tokenization_spaces": False},
    "other delimiter": {"vocab": VOCABULARY, "word_delimiter_token": "'", "replace_word_delimiter_char": "_"},
    "other special tokens": {
        "vocab": VOCABULARY | {"[PAD]": 15, "[UNK]": 16},
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
    },
    "special tokens outside": {"vocab": {"A": 0, "B": 1, "|": 2}},
    "by language": {
        "vocab": {"eng": VOCABULARY, "fra": {"<pad>": 0, "E": 1, "<unk>": 2, "É": 3}},
        "target_lang": "fra",
    },
}

TEXTS = (
    "HELLO TO",
    " A  TO ",
    "Hello to",
    "A <lang> TO",
    "A<lang>TO",
    "A  <lang>  <lang> TO ",
    "É È",
    "",
    " ",
    "A|TO",
    "A\nTO\tA",
    "<s>A</s> <pad> L<unk>E",
    "THAT'S 'A'",
)

#: Where the unknown token has no id in the vocabulary, 4.37.2 fails on unknown characters.
KNOWN_TEXTS = ("AB A", "B <s> A", "")

_RNG = np.random.RandomState(0)
IDS = (
    [9, 9, 0, 5, 10, 0, 10, 10, 8, 4, 4, 6, 8, 8],
    [4, 4, 9, 5, 0, 4, 0, 4, 6, 4],
    [0, 0, 0],
    [],
    [1, 7, 7, 2, 3, 12, 12, 0],
    [7, 99, -100, 6],
    [9, 5, 4, 11, 4, 13, 14, 4, 11, 13, 6],
    *(_RNG.randint(0, 15, size).tolist() for size in (3, 20, 60)),
)

#: Keyword arguments of ``decode``.
DECODINGS: tuple[dict[str, Any], ...] = (
    {},
    {"skip_special_tokens": True},
    {"group_tokens": False},
    {"clean_up_tokenization_spaces": True},
    {"output_char_offsets": True, "output_word_offsets": True},
    {"output_word_offsets": True, "skip_special_tokens": True},
)


def answers(tokenizer_class: type, directory: Path) -> dict[str, Any]:
    """Everything that the tokenizers of this class answer, as JSON holds it."""
    results: dict[str, Any] = {}
    for name, arguments in TOKENIZERS.items():
        vocabulary = directory / f"{name}.json"
        options = {option: value for option, value in arguments.items() if option != "vocab"}
        vocabulary.write_text(json.dumps(arguments["vocab"]), encoding="utf-8")
        tokenizer = tokenizer_class(str(vocabulary), **options)
        texts = KNOWN_TEXTS if name == "special tokens outside" else TEXTS
        decoded = {}
        for ids in IDS:
            for keywords in DECODINGS:
                decoded[f"{ids} {keywords}"] = _plain(tokenizer.decode(ids, **keywords))
        special = ("pad_token_id", "unk_token_id", "bos_token_id", "eos_token_id", "word_delimiter_token_id")
        results[name] = {
            "length": len(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "ids": {one: getattr(tokenizer, one) for one in special},
            "encoded": {text: tokenizer(text)["input_ids"] for text in texts},
            "tokens": {text: tokenizer.tokenize(text) for text in texts},
            "decoded": decoded,
        }
    return json.loads(json.dumps(results, default=int))


def _plain(output: Any) -> Any:
    if isinstance(output, str):
        return output
    return {"text": output.text, "characters": output.char_offsets or None, "words": output.word_offsets}
