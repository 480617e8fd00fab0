"""Configuration files that build upon one another: the key ``base`` names the file whose fields hold where a file is
silent."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from speech_flax.storage import exists, in_bucket, storage_path

_BASE = "base"
_OPTION = "--config"


class ConfigFileError(ValueError):
    """A base that cannot be used, in one sentence."""


def with_bases(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which a ``--config FILE`` whose file has a base gives the merged text instead.

    Raises:
        ConfigFileError: see :func:`merged_file`.
    """
    resolved = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == _OPTION:
            resolved.append(_text_or_path(argument))
        elif argument.startswith(f"{_OPTION}="):
            resolved.append(f"{_OPTION}={_text_or_path(argument.removeprefix(f'{_OPTION}='))}")
        else:
            resolved.append(argument)
    return resolved


def merged_file(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Fields of a YAML file over those of its base, which is named relative to it and may have a base itself. Mappings
    are merged, field by field; any other value, a list too, replaces that of the base.

    Args:
        path: The file.
        derived: The files that lead here, each the base of the one before.

    Raises:
        ConfigFileError: for a file that is not there or holds no fields, and for files that build upon each other.
    """
    if path.resolve() in [file.resolve() for file in derived]:
        raise ConfigFileError(f"base leads in a circle: {' -> '.join(map(str, (*derived, path)))}; break it")
    if not path.is_file():
        raise ConfigFileError(f"the base of {derived[-1]} is not there: {path}; it is named relative to that file")
    fields = _fields(path)
    base = fields.pop(_BASE, None)
    if base is None:
        return fields
    if not isinstance(base, str):
        raise ConfigFileError(f"base in {path} is {base!r}; it must be the name of one file")
    return _merge(merged_file(path.parent / base, (*derived, path)), fields)


def _text_or_path(name: str) -> str:
    if in_bucket(name):
        path = storage_path(name)
        if not exists(path):
            raise ConfigFileError(f"{name} does not exist")
        return path.read_text()
    path = Path(name)
    try:
        derived = path.is_file() and _BASE in _fields(path)
    except ConfigFileError:  # the parser says what is wrong with the file
        derived = False
    return yaml.safe_dump(merged_file(path), sort_keys=False) if derived else name


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path} is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigFileError(f"{path} holds no fields")
    return fields


def _merge(base: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    merged = {**base, **fields}
    for name in base.keys() & fields.keys():
        if isinstance(base[name], dict) and isinstance(fields[name], dict):
            merged[name] = _merge(base[name], fields[name])
    return merged
