"""Lists of trials: pairs of utterances, by the same speaker or by different ones."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from speech_flax.data.tables import SourceError

_COLUMNS = ("label", "file_1", "file_2")


@dataclasses.dataclass(frozen=True)
class Trial:
    """Whether the utterances with the ids ``first`` and ``second`` are by the same speaker."""

    same: bool
    first: str
    second: str


def read_trials(path: str | Path) -> list[Trial]:
    """Trials from a file with one per line: 1 or 0, and the ids of two utterances.

    The three are separated by commas or by spaces (as in the lists of VoxCeleb); a first line ``label,file_1,file_2``
    names them in another order, or is not there.

    Raises:
        SourceError: when the file does not exist, or a line is of another form.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise SourceError(f"there is no list of trials {path}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    order = _COLUMNS
    trials = []
    for number, line in enumerate(lines, 1):
        fields = [field.strip() for field in line.split(",")] if "," in line else line.split()
        if number == 1 and sorted(fields) == sorted(_COLUMNS):
            order = tuple(fields)
        elif fields:
            record = dict(zip(order, fields, strict=False))
            if len(fields) != 3 or record["label"] not in ("0", "1"):
                raise SourceError(f"{path}, line {number}, is no trial but {line!r}; expected '1,FILE,FILE' or '0,...'")
            trials.append(Trial(record["label"] == "1", record["file_1"], record["file_2"]))
    if not trials:
        raise SourceError(f"{path} holds no trials")
    return trials


def all_trials(ids: Sequence[str], speakers: Sequence[str]) -> list[Trial]:
    """Every pair of the utterances ``ids``."""
    pairs = ((left, right) for right in range(len(ids)) for left in range(right))
    return [Trial(speakers[left] == speakers[right], ids[left], ids[right]) for left, right in pairs]
