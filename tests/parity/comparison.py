"""How far two results are apart."""

import dataclasses
import json
import math

import numpy as np

from .variant import Variant, sketch

#: Largest allowed differences: absolute for activations and loss, relative for gradients.
FORWARD, LOSS, GRADIENT = 1e-4, 1e-4, 1e-3

_OF_GRADIENT = "gradients."


@dataclasses.dataclass(frozen=True)
class Differences:
    """Largest differences, and where they are.

    ``gradient`` is relative to the largest element of each parameter's gradient, or to a thousandth of the largest
    gradient of the model where that is larger: some gradients are zero but for rounding, which is that of the large
    ones they are sums of (the bias of the keys shifts all scores of a query alike).
    """

    forward: float
    loss: float
    gradient: float
    first_apart: str | None
    worst_gradient: str

    def check(self) -> None:
        """Raise an AssertionError that names the first output, from the bottom up, that is too far away."""
        assert self.first_apart is None, f"{self.first_apart} is the first output that differs; in all: {self}"
        assert self.loss <= LOSS, str(self)
        assert self.gradient <= GRADIENT, str(self)


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> Differences:
    """Every output and gradient of the reference with ours; stored gradients are sketches."""
    forward, first_apart = 0.0, None
    for name in sorted((name for name in theirs if not name.startswith(_OF_GRADIENT)), key=_depth):
        if name != "loss":
            assert name in ours, f"the reference returns {name}, we do not"
            assert ours[name].shape == theirs[name].shape, (name, ours[name].shape, theirs[name].shape)
            difference = float(np.abs(ours[name] - theirs[name]).max())
            forward = max(forward, difference)
            if not difference <= FORWARD and first_apart is None:
                first_apart = f"{name} ({difference:.1e})"
    gradients = {name: value for name, value in theirs.items() if name.startswith(_OF_GRADIENT)}
    largest = max(np.abs(value).max() for value in gradients.values())
    apart = {name: _gradient_difference(name, ours[name], value, largest) for name, value in gradients.items()}
    worst = max(apart, key=apart.__getitem__)
    return Differences(forward, float(np.abs(ours["loss"] - theirs["loss"])), apart[worst], first_apart, worst)


def stored(results: dict[str, np.ndarray], complete: bool) -> dict[str, np.ndarray]:
    """What a reference file keeps of one batch: gradients as sketches; hidden states and attentions if ``complete``."""
    kept = {}
    for name, value in results.items():
        if name.startswith(_OF_GRADIENT):
            kept[name] = value if value.size <= 4 else sketch(name, value)  # a sketch has four elements
        elif complete or not name.startswith(("hidden_states", "attentions")):
            kept[name] = value
    return kept


def save_reference(variant: Variant, results: dict[str, dict[str, np.ndarray]]) -> None:
    """Write the results by batch: all numbers in one array, so that a file is as small as they are."""
    arrays = {f"{batch}/{name}": value for batch, of_batch in results.items() for name, value in of_batch.items()}
    index = json.dumps({key: value.shape for key, value in arrays.items()})
    numbers = np.concatenate([value.ravel() for value in arrays.values()]).astype(np.float32)
    variant.reference.parent.mkdir(exist_ok=True)
    np.savez_compressed(variant.reference, index=np.array(index), numbers=numbers)


def load_reference(variant: Variant) -> dict[str, dict[str, np.ndarray]]:
    """The stored results by batch."""
    with np.load(variant.reference) as file:
        index, numbers = json.loads(str(file["index"])), file["numbers"]
    results: dict[str, dict[str, np.ndarray]] = {}
    start = 0
    for key, shape in index.items():
        batch, name = key.split("/")
        size = math.prod(shape)
        results.setdefault(batch, {})[name] = numbers[start : start + size].reshape(shape)
        start += size
    return results


def _depth(name: str) -> tuple[int, int, int]:
    """Outputs in the order in which a model computes them."""
    kind, _, index = name.partition(".")
    if kind in ("hidden_states", "attentions"):
        return 1, int(index), kind == "attentions"
    return (0 if kind == "extract_features" else 2), 0, 0


def _gradient_difference(name: str, ours: np.ndarray, theirs: np.ndarray, largest: float) -> float:
    if theirs.shape != ours.shape:
        ours = sketch(name, ours)
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-3 * largest))
