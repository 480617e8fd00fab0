"""Lists of trials: pairs of utterances, by the same speaker or by different ones."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from speech_flax.data.tables import SourceError

logger = logging.getLogger(__name__)

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


def find_trials(
    trials: Sequence[Trial], ids: Sequence[str]
) -> tuple[Int[np.ndarray, "found"], Int[np.ndarray, "found"], Bool[np.ndarray, "found"]]:
    """Where in ``ids`` the first and the second utterance are of every trial that has both there, and whether they are
    by the same speaker. Trials that are left out are counted in a warning.

    Raises:
        SourceError: when all would be left out.
    """
    place = {name: index for index, name in enumerate(ids)}
    found = [trial for trial in trials if trial.first in place and trial.second in place]
    if len(found) < len(trials):
        missing = next(name for trial in trials for name in (trial.first, trial.second) if name not in place)
        left_out = f"are left out: there is no utterance {missing}, for one, but {ids[0]}, for one"
        if not found:
            raise SourceError(f"all {len(trials)} trials {left_out}; list trials of these utterances")
        logger.warning("%d of %d trials %s", len(trials) - len(found), len(trials), left_out)
    first = np.array([place[trial.first] for trial in found])
    second = np.array([place[trial.second] for trial in found])
    return first, second, np.array([trial.same for trial in found])
