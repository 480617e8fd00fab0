"""Compiled programs as text (XLA's scheduled HLO): instructions, their bytes and their floating-point operations."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32}
_BITS |= {"u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all", "all-to-all")


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction: ``type`` is the text of its result's type, ``text`` all that follows the equals sign."""

    name: str
    opcode: str
    type: str
    text: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        start = self.text.index("(", len(self.type))
        depth = 0
        for position in range(start, len(self.text)):
            depth += {"(": 1, ")": -1}.get(self.text[position], 0)
            if depth == 0:
                return tuple(re.findall(r"%([\w.\-]+)", self.text[start:position]))
        raise ValueError(f"the operands of {self.name} do not end")

    def attribute(self, name: str) -> str | None:
        """The name that an attribute like ``calls=%name`` or ``called_computations={%name}`` holds."""
        found = re.search(rf"\b{name}=\{{?%?([\w.\-]+)", self.text)
        return found.group(1) if found else None

    @property
    def branches(self) -> list[str]:
        """Computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if found:
            return [name.strip().lstrip("%") for name in found.group(1).split(",")]
        return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.text)

    @property
    def op_name(self) -> str:
        """Where in the model's code it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found.group(1)) if found else None


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program: its computations by name, each a list of instructions in the order of their schedule."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def tables(self) -> dict[str, dict[str, Instruction]]:
        """Instructions by name, for every computation."""
        return {
            name: {instruction.name: instruction for instruction in instructions}
            for name, instructions in self.computations.items()
        }

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a ``while`` runs its body, if that is a constant."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
        if known:
            return int(known.group(1))
        condition = self.computations.get(loop.attribute("condition") or "", [])
        bounds = [int(n) for i in condition for n in re.findall(r"^[su]32\[\]\S* constant\((\d+)\)", i.text)]
        return max(bounds) if bounds else None

    def collective(self, instruction: Instruction) -> Instruction | None:
        """The communication between devices that an instruction is, starts, wraps or waits for; ``None`` for any other.

        Of one that wraps it, the wrapped instruction: of an asynchronous call, on a core of its own or not, of a fusion
        whose computation is named after it, and of the fusions ``async-collective-start`` and ``-done``, between which
        those of other work carry the communication on.
        """
        if instruction.opcode.startswith(_COLLECTIVES):
            return instruction
        called = instruction.attribute("calls") or ""
        named = any(kind in called for kind in _COLLECTIVES) or instruction.name.startswith("async-collective-")
        if instruction.opcode == "async-start" or (instruction.opcode == "fusion" and named):
            return self._collective_within(called)
        return None

    def _collective_within(self, computation: str) -> Instruction | None:
        for inner in self.computations.get(computation, []):
            if inner.opcode.startswith(_COLLECTIVES):
                return inner
            called = inner.attribute("called_computations")  # of what runs on a core of its own
            if called and (found := self._collective_within(called)):
                return found
        return None

    def walk(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """Every scheduled instruction with its computation and how often it runs; of a conditional, all branches."""
        name = self.entry if computation is None else computation
        for instruction in self.computations[name]:
            if instruction.opcode == "while":
                body = instruction.attribute("body")
                yield from self.walk(body, times * (self.trip_count(instruction) or 1))
            elif instruction.opcode == "conditional":
                for branch in instruction.branches:
                    yield from self.walk(branch, times)
            elif instruction.opcode == "call":
                yield from self.walk(instruction.attribute("to_apply"), times)
            else:
                yield name, instruction, times


def parse_program(text: str) -> Program:
    """The program in the text of a compiled module.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and "=" not in line.split("(")[0]:
            current = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)) and (op := _OPCODE.search(found.group(3))):
            rest = found.group(3)
            current.append(
                Instruction(found.group(2), op.group(1), rest[: op.start()], rest, found.group(1) is not None)
            )
    if entry is None:
        raise ValueError("the text is not that of a compiled module: it has no ENTRY computation")
    return Program(computations, entry)


def array_bytes(type_: str, *, main_memory: bool = False) -> int:
    """Bytes of the arrays in the text of a type, without padding to tiles; ``main_memory`` leaves out those that the
    compiler keeps on the chip."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_):
        on_chip = re.search(r"S\([1-9]", layout) is not None
        if dtype in _BITS and not (main_memory and on_chip):
            total += math.prod(int(size) for size in shape.split(",") if size) * _BITS[dtype] // 8
    return total


def array_shape(type_: str) -> tuple[int, ...]:
    """Shape of the first array in the text of a type."""
    found = _ARRAY.search(type_)
    return tuple(int(size) for size in found.group(2).split(",") if size) if found else ()


def collective_kind(collective: Instruction) -> str:
    """``all-gather``, ``all-reduce``, ``reduce-scatter``, ``collective-permute``, ``all-to-all`` or
    ``ragged-all-to-all``."""
    return next(kind for kind in _COLLECTIVES if collective.opcode.startswith(kind))


def group_size(collective: Instruction) -> int:
    """How many devices take part in each group of a communication; 1 when the text does not say."""
    text = collective.text
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([0-9,]+)\}", text):
        return found.group(1).count(",") + 1
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
        return math.prod(sizes.get(name, 1) for name in re.findall(r"'(\w+)'", found.group(2)))
    return 1


def matmul_flops(instruction: Instruction, program: Program, computation: str) -> int:
    """Floating-point operations of the matrix products and convolutions in an instruction, or in what it calls."""
    if instruction.opcode == "fusion":
        called = instruction.attribute("calls")
        return sum(matmul_flops(inner, program, called) for inner in program.computations.get(called, []))
    table = program.tables[computation]
    if instruction.opcode not in ("dot", "convolution") or not all(name in table for name in instruction.operands):
        return 0
    left, right = (array_shape(table[name].type) for name in instruction.operands[:2])
    output = array_shape(instruction.type)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.text).group(1)
        return 2 * math.prod(output) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    return _convolution_flops(instruction, left, right, output)


def _convolution_flops(instruction: Instruction, left: tuple, right: tuple, output: tuple) -> int:
    """Multiply-adds that touch no padding: compilers write batched matrix products as dilated convolutions."""
    left_axes, right_axes, output_axes = re.search(
        r"dim_labels=(\S+?)_(\S+?)->([0-9a-z]+)", instruction.text
    ).groups()  # fmt: skip
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}

    def field(name: str, axis: int, default: int) -> int:
        return int(fields[name].split("x")[axis].split("_")[0]) if name in fields else default

    products = output[output_axes.index("b")] * output[output_axes.index("f")] * right[right_axes.index("i")]
    for axis, label in enumerate(sorted(label for label in output_axes if label.isdigit())):
        outputs, taps = output[output_axes.index(label)], field("size", axis, 1)
        dilation = field("lhs_dilate", axis, 1)
        extent = (left[left_axes.index(label)] - 1) * dilation + 1
        starts = np.arange(outputs)[:, None] * field("stride", axis, 1) - field("pad", axis, 0)
        positions = starts + np.arange(taps)[None] * field("rhs_dilate", axis, 1)
        products *= int(((positions >= 0) & (positions < extent) & (positions % dilation == 0)).sum())
    return 2 * products
