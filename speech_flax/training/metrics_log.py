"""Where the numbers of a run are written: JSON Lines, TensorBoard and, when asked for, Weights & Biases."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from speech_flax.training.experiment import ExperimentError


def check_wandb(project: str | None) -> None:
    """Refuse to log to Weights & Biases without its package.

    Raises:
        ExperimentError: when it is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ExperimentError("wandb_project needs the package wandb: pip install 'speech_flax[wandb]'")


class MetricsLog:
    """One JSON object per line in ``metrics.jsonl``, and the same numbers elsewhere.

    Lines of steps after ``first_step`` are dropped when a run goes on from an earlier checkpoint: the log reads as if
    the run had never been interrupted.
    """

    def __init__(self, directory: Path, first_step: int, wandb_project: str | None = None):
        from tensorboardX import SummaryWriter

        path = directory / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= first_step]
        aside = path.with_suffix(".jsonl.partial")
        aside.write_text("".join(line + "\n" for line in kept))
        aside.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        self._wandb = None
        if wandb_project is not None:
            import wandb

            identity = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=8).hexdigest()
            self._wandb = wandb.init(
                project=wandb_project, name=directory.name, id=identity, resume="allow", dir=str(directory)
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append ``values`` of ``step``; keys are ``train/loss`` and the like."""
        self._file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _complete_lines(path: Path) -> list[str]:
    """The lines of a log, without a last one that a killed process left unfinished."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return lines
