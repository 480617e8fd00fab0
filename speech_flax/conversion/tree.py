"""Our parameter trees, addressed by path, and the stacked encoder layers by number."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import numpy as np
from jaxtyping import PyTree

from speech_flax.conversion.rules import SAME, NameTable, Place, Transform

#: Leaves below this module stack one tensor per encoder layer.
STACKED = "encoder/layers/"


def flat(params: PyTree) -> dict[str, Any]:
    """Leaves by path, the names joined with slashes."""
    return flax.traverse_util.flatten_dict(params, sep="/")


def nested(leaves: Mapping[str, Any]) -> PyTree:
    """The inverse of :func:`flat`."""
    return flax.traverse_util.unflatten_dict(dict(leaves), sep="/")


def is_stacked(path: str) -> bool:
    """Whether the leaf at ``path`` has a leading axis of encoder layers."""
    return f"/{STACKED}" in f"/{path}"


def leaf_places(path: str, shape: tuple[int, ...]) -> Iterator[Place]:
    """The places in one leaf: one, or one per encoder layer."""
    if is_stacked(path):
        yield from (Place(path, layer) for layer in range(shape[0]))
    else:
        yield Place(path)


def parts(path: str, leaf: np.ndarray) -> list[np.ndarray]:
    """Views of the tensors at :func:`leaf_places`, to be filled."""
    return [leaf[layer] for layer in range(len(leaf))] if is_stacked(path) else [leaf]


def places(params: PyTree) -> Iterator[Place]:
    """Every place in a tree of arrays or shapes."""
    for path, leaf in flat(params).items():
        yield from leaf_places(path, leaf.shape)


def tensor_at(params: PyTree, place: Place) -> np.ndarray:
    """The tensor at ``place``, on the host."""
    leaf: Any = params
    for name in place.path.split("/"):
        leaf = leaf[name]
    return np.asarray(leaf if place.layer is None else leaf[place.layer])


def parameter_tree(tensors: Mapping[Place, np.ndarray]) -> PyTree:
    """The tree that holds ``tensors``, encoder layers stacked.

    Raises:
      ValueError: encoder layers are missing, or differ in shape.
    """
    layers: dict[str, dict[int, np.ndarray]] = {}
    leaves: dict[str, np.ndarray] = {}
    for place, tensor in tensors.items():
        if place.layer is None:
            leaves[place.path] = tensor
        else:
            layers.setdefault(place.path, {})[place.layer] = tensor
    count = max((max(found) + 1 for found in layers.values()), default=0)
    for path, found in layers.items():
        missing = sorted(set(range(count)) - set(found))
        if missing:
            raise ValueError(f"{path} has no tensor for encoder layer {missing[0]}")
        if len({tensor.shape for tensor in found.values()}) > 1:
            raise ValueError(f"{path} has tensors of different shapes in different encoder layers")
        leaves[path] = np.stack([found[layer] for layer in range(count)])
    return nested(leaves)


@dataclasses.dataclass(frozen=True)
class OurNames(NameTable):
    """The table of our own names: what :class:`Place` is printed as."""

    def place(self, name: str) -> tuple[Place, Transform]:
        path, layer = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", name, re.DOTALL).groups()
        return Place(path, None if layer is None else int(layer)), SAME

    def name(self, place: Place) -> tuple[str, Transform]:
        return str(place), SAME


OURS = OurNames(rules=())
