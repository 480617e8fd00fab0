"""Rules that give each tensor of a foreign checkpoint its place in our parameter tree, and back.

A rule is a pair of names with fields in braces. ``encoder.layers.{layer}.ffn1.{part:intermediate|output}_dense.weight``
and ``encoder/layers/ffn1/{part}_dense/kernel`` are one pair: a field stands for a number unless it lists alternatives,
and a ``{layer}`` that the second name lacks becomes the leading axis of our stacked encoder layers.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Shaped

Tensor = Shaped[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor is laid out there and here; both functions return views, or copies without change of value."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]

    def our_shape(self, theirs: Sequence[int]) -> tuple[int, ...]:
        """Shape here of a tensor that has shape ``theirs`` there; ``theirs`` itself if it cannot be laid out so."""
        try:
            return self.to_ours(np.broadcast_to(np.zeros((), np.int8), tuple(theirs))).shape
        except (IndexError, ValueError):
            return tuple(theirs)

    def their_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """Shape there of a tensor that has shape ``ours`` here."""
        return self.to_theirs(np.broadcast_to(np.zeros((), np.int8), tuple(ours))).shape


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T


SAME = Transform(_same, _same)
#: Linear layers: [out, in] there, [in, out] here. Convolutions: [out, in, width] there, [width, in, out] here.
TRANSPOSED = Transform(_transposed, _transposed)
#: Convolutions of width 1, which are linear layers here: [out, in, 1] there, [in, out] here.
POINTWISE = Transform(lambda tensor: np.squeeze(tensor, 2).T, lambda tensor: tensor.T[:, :, None])
#: Magnitudes of a weight-normalised convolution: [1, 1, width] there, [width] here.
MAGNITUDE = Transform(lambda tensor: np.squeeze(tensor, (0, 1)), lambda tensor: tensor[None, None])


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor's place in our tree: the path of a leaf and, if the leaf stacks the encoder's layers, the layer."""

    path: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.path if self.layer is None else f"{self.path}[{self.layer}]"


_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A foreign name, ours, and how the tensor changes between them."""

    theirs: str
    ours: str
    transform: Transform = SAME

    @cached_property
    def _fields(self) -> dict[str, str]:
        return {name: alternatives or r"\d+" for name, alternatives in _FIELD.findall(self.theirs)}

    def _expression(self, name: str) -> re.Pattern[str]:
        pieces, position = [], 0
        for field in _FIELD.finditer(name):
            pieces += [re.escape(name[position : field.start()]), f"(?P<{field[1]}>{self._fields[field[1]]})"]
            position = field.end()
        return re.compile("".join([*pieces, re.escape(name[position:])]))

    @cached_property
    def _their_expression(self) -> re.Pattern[str]:
        return self._expression(self.theirs)

    @cached_property
    def _our_expression(self) -> re.Pattern[str]:
        return self._expression(self.ours)

    def place(self, name: str) -> Place | None:
        """Our place of the foreign ``name``; ``None`` if the rule is not about it."""
        match = self._their_expression.fullmatch(name)
        if match is None:
            return None
        fields = match.groupdict()
        stacked = "layer" in fields and "{layer}" not in self.ours
        return Place(_FIELD.sub(lambda field: fields[field[1]], self.ours), int(fields["layer"]) if stacked else None)

    def name(self, place: Place) -> str | None:
        """The foreign name of our ``place``; ``None`` if the rule is not about it."""
        match = self._our_expression.fullmatch(place.path)
        if match is None or (place.layer is not None) != ("layer" in self._fields and "{layer}" not in self.ours):
            return None
        fields = match.groupdict() | ({} if place.layer is None else {"layer": str(place.layer)})
        return _FIELD.sub(lambda field: fields[field[1]], self.theirs)


@dataclasses.dataclass(frozen=True)
class NameTable:
    """All rules of one format, and the tensors that it holds and we have no use for.

    Of several rules with one foreign name or one place the first counts; a place is written under the name of its first
    rule, and read under any.

    Attributes:
      rules: The rules.
      dropped: Regular expressions of foreign names that are known to have no counterpart here.
      constants: Foreign names (with fields) that must be there when another one is, and their value:
        ``(name, name of the other, value)``.
    """

    rules: tuple[Rule, ...]
    dropped: tuple[str, ...] = ()
    constants: tuple[tuple[str, str, np.ndarray], ...] = ()

    def place(self, name: str) -> tuple[Place, Transform] | None:
        """Our place of a foreign ``name``, and how the tensor changes on the way; ``None`` if no rule knows it."""
        for rule in self.rules:
            if (place := rule.place(name)) is not None:
                return place, rule.transform
        return None

    def name(self, place: Place) -> tuple[str, Transform] | None:
        """The foreign name of ``place``, and how the tensor changes on the way back; ``None`` if it has none there."""
        for rule in self.rules:
            if (name := rule.name(place)) is not None:
                return name, rule.transform
        return None

    def drops(self, name: str) -> bool:
        """Whether ``name`` is known to have no counterpart here."""
        return any(re.fullmatch(pattern, name) for pattern in self.dropped)

    def constants_of(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Tensors of fixed value that belong to a checkpoint with these ``names``."""
        found = {}
        for name, partner, value in self.constants:
            found |= {other[: -len(partner)] + name: value for other in names if other.endswith(partner)}
        return found


def mirrored(theirs: str) -> str:
    """Our path for a module whose name differs in nothing but its punctuation."""
    return theirs.replace(".{layer}", "").replace(".{index}", "_{index}").replace(".", "/")


def linear(theirs: str, ours: str | None = None) -> tuple[Rule, ...]:
    """Rules of a linear layer."""
    return _weights_and_bias(theirs, ours, "kernel", TRANSPOSED)


def convolution(theirs: str, ours: str | None = None) -> tuple[Rule, ...]:
    """Rules of a convolution over time."""
    return _weights_and_bias(theirs, ours, "kernel", TRANSPOSED)


def pointwise(theirs: str, ours: str | None = None) -> tuple[Rule, ...]:
    """Rules of a convolution of width 1."""
    return _weights_and_bias(theirs, ours, "kernel", POINTWISE)


def norm(theirs: str, ours: str | None = None) -> tuple[Rule, ...]:
    """Rules of a normalisation layer."""
    return _weights_and_bias(theirs, ours, "scale", SAME)


def _weights_and_bias(theirs: str, ours: str | None, weight: str, transform: Transform) -> tuple[Rule, ...]:
    ours = mirrored(re.sub(r":[^}]*\}", "}", theirs)) if ours is None else ours
    return Rule(f"{theirs}.weight", f"{ours}/{weight}", transform), Rule(f"{theirs}.bias", f"{ours}/bias")
