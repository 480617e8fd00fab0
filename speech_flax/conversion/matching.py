"""Which tensor of a checkpoint fills which parameter of a model, and what is left over on either side."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from speech_flax.conversion.rules import NameTable, Place, Transform
from speech_flax.conversion.tree import is_stacked, leaf_places

#: Names under which a model with a head holds its base model.
BASE_NAMES = ("hubert", "wav2vec2_bert")


@dataclasses.dataclass(frozen=True)
class Matching:
    """The outcome of :func:`match`.

    Attributes:
      sources: Name and transform of the tensor for each place of the model that has one of the right shape.
      missing: Places of the model for which the checkpoint has no tensor.
      mismatched: Places whose tensor has another shape: its name, its shape as laid out here, the model's shape.
      unused: Names that the format knows and this model has no place for (another head, say), with their shapes.
      unknown: Names that the format does not know, with their shapes.
      dropped: Names that are known to have no counterpart.
    """

    sources: dict[Place, tuple[str, Transform]]
    missing: tuple[Place, ...]
    mismatched: dict[Place, tuple[str, tuple[int, ...], tuple[int, ...]]]
    unused: dict[str, tuple[int, ...]]
    unknown: dict[str, tuple[int, ...]]
    dropped: tuple[str, ...]


def match(tensors: Mapping[str, Any], table: NameTable, shapes: Mapping[str, tuple[int, ...]]) -> Matching:
    """Match what has a ``shape`` under foreign names with the parameters of a model.

    A checkpoint of a base model fits a model with a head, and the other way round.

    Args:
      tensors: By foreign name.
      table: Rules of the format.
      shapes: Shape of every parameter of the model by path.

    Raises:
      ValueError: two tensors for one place.
    """
    wanted = {
        place: tuple(shape[1:] if is_stacked(path) else shape)
        for path, shape in shapes.items()
        for place in leaf_places(path, shape)
    }
    sources: dict[Place, tuple[str, Transform]] = {}
    mismatched, unused, unknown, dropped = {}, {}, {}, []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if table.drops(name):
            dropped.append(name)
        elif (found := table.place(name)) is None:
            unknown[name] = shape
        elif (place := _in_model(found[0], wanted)) is None:
            unused[name] = shape
        else:
            taken = sources.get(place) or mismatched.get(place)
            if taken is not None:
                raise ValueError(f"the tensors {taken[0]!r} and {name!r} are both for {place}")
            ours = found[1].our_shape(shape)
            if ours == wanted[place]:
                sources[place] = name, found[1]
            else:
                mismatched[place] = name, ours, wanted[place]
    missing = tuple(place for place in wanted if place not in sources and place not in mismatched)
    return Matching(sources, missing, mismatched, unused, unknown, tuple(dropped))


def _in_model(place: Place, wanted: Mapping[Place, Any]) -> Place | None:
    """The place in this model, which may or may not hold its base model under a name of its own."""
    if place in wanted:
        return place
    for base in BASE_NAMES:
        if place.path.startswith(f"{base}/"):
            below = dataclasses.replace(place, path=place.path.removeprefix(f"{base}/"))
        else:
            below = dataclasses.replace(place, path=f"{base}/{place.path}")
        if below in wanted:
            return below
    return None


def nearest(name: str, known: Sequence[str]) -> str:
    """``"; the nearest is ..."``, or nothing if nothing is near."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; the nearest name is {found[0]!r}" if found else ""
