"""The files of a CTC tokenizer, in the formats of Transformers."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCABULARY_FILE = "vocab.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"

#: Special tokens with a role, in the order in which those outside the vocabulary get their ids.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_OPTIONS = (
    "word_delimiter_token",
    "replace_word_delimiter_char",
    "do_lower_case",
    "target_lang",
    "clean_up_tokenization_spaces",
)
#: Under either name: Transformers 4, 5.
_MORE_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that the files add to the vocabulary, and that is spelled as a whole.

    Attributes:
        id: Its id.
        content: How it is spelled.
        lstrip: Whether it swallows the spaces before it.
        rstrip: Whether it swallows those after it.
        special: Whether it was added as a special token.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    special: bool = False


def read_vocabulary(path: Path) -> dict[str, Any]:
    """What maps symbols, or languages and symbols, to ids.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such vocabulary file")
    vocabulary = _read(path)
    if not vocabulary:
        raise ValueError(f"{path} does not map symbols to ids")
    return vocabulary


def read_arguments(directory: Path) -> dict[str, Any]:
    """Arguments of the tokenizer, but for its vocabulary, that the files in ``directory`` state.

    Which file counts is as in Transformers: where ``tokenizer_config.json`` lists the added tokens it has everything,
    else the other two files complete it.

    Raises:
        ValueError: when a file is damaged, or has an added token of a kind that is not supported.
    """
    config = _read_if_there(directory / CONFIG_FILE)
    if "added_tokens_decoder" in config:
        listed = {index: _fields(token) for index, token in _mapping(config, "added_tokens_decoder").items()}
    else:
        config |= _read_if_there(directory / SPECIAL_TOKENS_FILE)
        added = _read_if_there(directory / ADDED_TOKENS_FILE)
        listed = {index: {"content": token} for token, index in added.items()}
    arguments = {name: _content(config[name]) for name in SPECIAL_TOKENS if name in config}
    arguments |= {name: _content(config[name]) for name in _OPTIONS if config.get(name) is not None}
    more = [token for name in _MORE_SPECIAL_TOKENS for token in _values(config.get(name))]
    if more:
        arguments["additional_special_tokens"] = tuple(dict.fromkeys(map(_content, more)))
    if listed:
        arguments["added_tokens"] = tuple(_added_token(index, fields) for index, fields in listed.items())
    return arguments


def write_files(directory: Path, vocabulary: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the vocabulary, and the ``config`` with the special tokens in it, which is made if it does not exist."""
    directory.mkdir(parents=True, exist_ok=True)
    names = (*SPECIAL_TOKENS, _MORE_SPECIAL_TOKENS[0])
    special = {name: config[name] for name in names if config.get(name) is not None}
    for name, content in ((VOCABULARY_FILE, vocabulary), (SPECIAL_TOKENS_FILE, special), (CONFIG_FILE, config)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read(path) if path.is_file() else {}


def _mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config[name] if isinstance(config[name], dict) else {}


def _values(tokens: Any) -> list[Any]:
    """The tokens in a list, or in a mapping from names that a model gives them."""
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


def _content(token: Any) -> Any:
    """A token that Transformers may have saved with its options around it."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def _fields(token: Any) -> dict[str, Any]:
    return token if isinstance(token, dict) else {"content": token}


def _added_token(index: Any, fields: dict[str, Any]) -> AddedToken:
    content = fields.get("content")
    if not str(index).isdecimal() or not isinstance(content, str):
        raise ValueError(f"the added token {content!r} with the id {index!r} is no text with a number")
    if fields.get("single_word"):
        raise ValueError(
            f"the added token {content!r} is one for single words (single_word), which this tokenizer does not know"
        )
    flags = {name: bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "special")}
    return AddedToken(int(index), content, **flags)
