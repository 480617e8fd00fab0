"""Where the numbers of a run are written: JSON Lines, TensorBoard and, when asked for, Weights & Biases."""

import functools
import hashlib
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from speech_flax.storage import AnyPath
from speech_flax.training.experiment import ExperimentError


def check_wandb(project: str | None) -> None:
    """Refuse to log to Weights & Biases without its package.

    Raises:
        ExperimentError: when it is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ExperimentError("wandb_project needs the package wandb: pip install 'speech_flax[wandb]'")


#: Seconds between two copies of a log to a bucket, whose objects cannot grow.
_COPY_SECONDS = 30.0


class MetricsLog:
    """One JSON object per line in ``metrics.jsonl``, and the same numbers elsewhere.

    Lines of steps after ``first_step`` are dropped when a run goes on from an earlier checkpoint, and those of its
    evaluation if ``evaluated`` says that it is to be done again: no step is logged twice. The means of the first line
    after a checkpoint are of the steps since. In a bucket the log is written anew every half minute and in
    :meth:`flush`.
    """

    def __init__(
        self, directory: AnyPath, first_step: int, wandb_project: str | None = None, *, evaluated: bool = True
    ):
        def is_kept(row: dict[str, Any]) -> bool:
            return row["step"] < first_step or (row["step"] == first_step and (evaluated or "train/loss" in row))

        path = directory / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if is_kept(json.loads(line))]
        self._lines = _FileLines(path, kept) if isinstance(path, Path) else _BucketLines(path, kept)
        self._board_directory, self._first_step = str(directory / "tensorboard"), first_step
        self._wandb = None
        if wandb_project is not None:
            import wandb

            local = isinstance(directory, Path)
            place = str(directory.resolve() if local else directory)
            identity = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
            options = {"dir": place} if local else {}
            self._wandb = wandb.init(project=wandb_project, name=directory.name, id=identity, resume="allow", **options)

    @functools.cached_property
    def _board(self) -> Any:
        """Opened when there is something to write, while the device is at work: its import takes a second."""
        from tensorboardX import SummaryWriter

        first = self._first_step + 1
        return SummaryWriter(self._board_directory, purge_step=first, filename_suffix=f".{first}")  # names hold seconds

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append ``values`` of ``step``; keys are ``train/loss`` and the like."""
        self._lines.append(json.dumps({"step": step, **values}, ensure_ascii=False))
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Return when all lines are where a run that goes on will find them."""
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class _FileLines:
    """The lines of a file, each written at once."""

    def __init__(self, path: Path, lines: list[str]):
        aside = path.with_suffix(".jsonl.partial")
        aside.write_text("".join(line + "\n" for line in lines))
        aside.replace(path)
        self._file = path.open("a")

    def append(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Nothing is left to be written."""

    def close(self) -> None:
        self._file.close()


class _BucketLines:
    """The lines of an object, which is replaced as a whole."""

    def __init__(self, path: AnyPath, lines: list[str]):
        self._path = path
        self._lines = lines
        self._written = -1
        self._copied = time.monotonic()

    def append(self, line: str) -> None:
        self._lines.append(line)
        if time.monotonic() - self._copied > _COPY_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._written != len(self._lines):
            self._path.write_text("".join(line + "\n" for line in self._lines))
            self._written = len(self._lines)
        self._copied = time.monotonic()

    def close(self) -> None:
        self.flush()


def _complete_lines(path: AnyPath) -> list[str]:
    """The lines of a log, without a last one that a killed process left unfinished."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return lines
