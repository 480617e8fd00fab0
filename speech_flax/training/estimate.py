"""How long a compiled program takes on a TPU chip: a static estimate from its schedule.

Every instruction takes the longest of: its matrix products at ``MATMUL_EFFICIENCY`` of the peak; its traffic with the
main memory at ``MEMORY_EFFICIENCY`` of the bandwidth; and, where the compiler's final instructions were dumped, their
number of cycles. Instructions follow each other; prefetches and communication that the schedule starts early cost what
is left of them when they are waited for. Communication moves along one axis of the network in both directions, one
after another; a permutation goes one way and leaves the other direction free; what all send to all others is held up
by the links in the middle of the longest axis. Loops count as often as they run. Neither the host nor the start of
programs is counted.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from speech_flax.training.hlo import (
    Instruction,
    Program,
    array_bytes,
    array_shape,
    collective_kind,
    group_size,
    matmul_flops,
)
from speech_flax.training.tpu_slices import Slice

MATMUL_EFFICIENCY = 0.97
MEMORY_EFFICIENCY = 0.9
COLLECTIVE_LATENCY = 2e-6  # seconds

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "add-dependency", "iota"}
_ALLOCATION = 'custom_call_target="AllocateBuffer"'  # room for what a loop writes, which stays as it is found
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass
class Cost:
    """Time [s] of one instruction over all its runs, and what bounds it: "matmul", "memory", "vector" or a wait."""

    seconds: float
    bound: str
    instruction: Instruction
    times: int


@dataclasses.dataclass
class Communication:
    """One communication: bytes of its arrays, whole, devices per group, seconds over all its runs, and how many of
    them nothing else hides."""

    kind: str
    bytes: int
    group: int
    times: int
    asynchronous: bool
    seconds: float
    exposed: float
    op_name: str


@dataclasses.dataclass
class Estimate:
    """Seconds of a program, by what bounds them, with the costliest instructions and all communications.

    ``unknown`` counts instructions, over all their runs, whose cost is not fully known, by the reason.
    """

    seconds: float
    costs: list[Cost]
    communications: list[Communication]
    unknown: dict[str, int]

    @property
    def by_bound(self) -> dict[str, float]:
        """Seconds by what bounds them."""
        total: collections.Counter[str] = collections.Counter()
        for cost in self.costs:
            total[cost.bound] += cost.seconds
        return dict(total)

    def summed_communications(self) -> list[dict[str, Any]]:
        """Communications by kind, group and whether the schedule starts them early; the slowest first."""
        total: dict[tuple, dict[str, Any]] = {}
        for one in self.communications:
            key = one.kind, one.group, one.asynchronous
            entry = total.setdefault(
                key,
                {"kind": one.kind, "devices": one.group, "asynchronous": one.asynchronous, "times": 0, "bytes": 0}
                | {"seconds": 0.0, "exposed": 0.0},
            )
            entry["times"] += one.times
            entry["bytes"] += one.bytes * one.times
            entry["seconds"] += one.seconds
            entry["exposed"] += one.exposed
        return sorted(total.values(), key=lambda entry: -entry["seconds"])

    def costliest(self, number: int = 12) -> list[dict[str, Any]]:
        """The instructions that take longest."""
        return [
            {"seconds": cost.seconds, "bound": cost.bound, "times": cost.times, "what": describe(cost.instruction)}
            for cost in self.costs[:number]
        ]


def memory_traffic(instruction: Instruction, program: Program, computation: str) -> int:
    """Bytes that an instruction reads from and writes to the main memory: of an operand that it slices, the slice."""
    table = program.tables[computation]
    operands = [table[name] for name in instruction.operands if name in table]
    if instruction.opcode == "dynamic-update-slice":
        return 2 * array_bytes(operands[1].type) if len(operands) > 1 else 0
    if instruction.opcode in ("dynamic-slice", "slice"):
        return 2 * array_bytes(instruction.type)
    written = array_bytes(instruction.type, main_memory=True)
    if instruction.opcode != "fusion":
        return written + sum(array_bytes(operand.type, main_memory=True) for operand in operands)
    called = instruction.attribute("calls")
    read = sum(
        min(array_bytes(operand.type, main_memory=True), _bytes_read(program, called, number))
        for number, operand in enumerate(operands)
    )
    for inner in program.computations.get(called, []):
        if inner.opcode == "dynamic-update-slice":
            update = program.tables[called].get(inner.operands[1])
            if update is not None and array_bytes(inner.type) <= written:
                written += array_bytes(update.type) - array_bytes(inner.type)
    return int(read) + max(written, 0)


def _bytes_read(program: Program, computation: str, number: int) -> float:
    """Bytes of its ``number``-th parameter that a computation reads; infinite if all, whatever the size."""
    instructions = program.computations.get(computation, [])
    parameter = next((i for i in instructions if i.opcode == "parameter" and f"parameter({number})" in i.text), None)
    return float("inf") if parameter is None else _bytes_read_of(program, computation, parameter.name)


def _bytes_read_of(program: Program, computation: str, name: str) -> float:
    total = 0.0
    for user in program.computations[computation]:
        if user.opcode == "parameter" or name not in user.operands:
            continue
        if user.opcode in _SLICES:
            total += array_bytes(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode == "bitcast":
            total += _bytes_read_of(program, computation, user.name)
        elif user.opcode == "fusion":
            total += _bytes_read(program, user.attribute("calls"), user.operands.index(name))
        else:
            return float("inf")
    return total


def estimate(program: Program, slice_: Slice, cycles: Mapping[str, int] | None = None) -> Estimate:
    """Walk the schedule of a program for the chips of ``slice_``.

    Args:
        cycles: Of instructions by name, from the compiler's final instructions (:mod:`bundles`); without them, what the
            vector unit computes costs its memory traffic alone and the estimate is a lower bound.
    """
    walker = _Walker(program, slice_, dict(cycles or {}))
    seconds = walker.run(program.entry, 1)
    costs = sorted(walker.costs, key=lambda cost: -cost.seconds)
    return Estimate(seconds, costs, walker.communications, dict(walker.unknown))


class _Walker:
    """Adds up the schedule, computation by computation."""

    def __init__(self, program: Program, slice_: Slice, cycles: dict[str, int]):
        self.program = program
        self.slice = slice_
        self.chip = slice_.chip
        self.cycles = cycles
        self.costs: list[Cost] = []
        self.communications: list[Communication] = []
        self.unknown: collections.Counter[str] = collections.Counter()
        # Equal instructions are compiled once, and the dump names one of them.
        self.twins = {}
        for computation, instructions in program.computations.items():
            for instruction in instructions:
                if instruction.name in cycles:
                    self.twins[self._signature(instruction, computation)] = cycles[instruction.name]

    def _signature(self, instruction: Instruction, computation: str) -> tuple:
        table = self.program.tables[computation]
        types = (instruction.type, *(table[name].type for name in instruction.operands if name in table))
        return (instruction.opcode, instruction.cycles, *(re.sub(r"S\(\d\)", "", type_) for type_ in types))

    def run(self, computation: str, times: int) -> float:
        """Seconds of one run of ``computation``, which runs ``times`` times."""
        now = links_free = 0.0
        in_flight: dict[str, tuple[float, Communication | None]] = {}
        for instruction in self.program.computations[computation]:
            opcode = instruction.opcode
            if opcode in _FREE or _ALLOCATION in instruction.text:
                continue
            if opcode == "while":
                trips = self.program.trip_count(instruction)
                if trips is None:
                    self.unknown["loops whose number of runs is unknown, counted once"] += times
                    trips = 1
                now += trips * self.run(instruction.attribute("body"), times * trips)
            elif opcode == "conditional":
                now += self._longest_branch(instruction, times)
            elif opcode == "call":
                now += self.run(instruction.attribute("to_apply"), times)
            elif opcode.endswith("-done") or instruction.name.startswith("async-collective-done"):
                now += self._wait(instruction, in_flight, now, times)
            elif opcode == "async-start" and not instruction.operands:
                continue  # a core of its own is made ready; an update gives it what to send
            elif collective := self._begun(instruction, computation):
                communication = self._communication(instruction, collective, times)
                self.communications.append(communication)
                # One after another over the same links; a permutation alone uses half of them.
                links_free = max(now, links_free) + communication.seconds / times
                one_link = communication.seconds / times * (2 if communication.kind == "collective-permute" else 1)
                end = max(links_free, now + one_link) + COLLECTIVE_LATENCY
                if communication.asynchronous:
                    in_flight[self._ticket(instruction)] = end, communication
                else:
                    communication.exposed = (end - now) * times
                    self.costs.append(Cost((end - now) * times, "communication", instruction, times))
                    now = end
            elif opcode.endswith("-start"):
                moved = array_bytes(instruction.type) / 2
                in_flight[instruction.name] = now + moved / self._memory_bandwidth, None
            else:
                seconds, bound = self._cost(instruction, computation, times)
                self.costs.append(Cost(seconds * times, bound, instruction, times))
                now += seconds
        return now

    def _begun(self, instruction: Instruction, computation: str) -> Instruction | None:
        """The communication that begins with an instruction."""
        if instruction.opcode == "async-update":
            instruction = self.program.tables[computation][instruction.operands[0]]
        return self.program.collective(instruction)

    @property
    def _memory_bandwidth(self) -> float:
        return self.chip.memory_bandwidth * MEMORY_EFFICIENCY

    def _longest_branch(self, conditional: Instruction, times: int) -> float:
        """LayerDrop and the like: the estimate is of a step in which nothing is skipped."""
        before = len(self.costs), len(self.communications)
        longest, kept = -1.0, ([], [])
        for branch in conditional.branches:
            seconds = self.run(branch, times)
            parts = self.costs[before[0] :], self.communications[before[1] :]
            del self.costs[before[0] :], self.communications[before[1] :]
            if seconds > longest:
                longest, kept = seconds, parts
        self.costs += kept[0]
        self.communications += kept[1]
        return max(longest, 0.0)

    def _wait(self, done: Instruction, in_flight: dict, now: float, times: int) -> float:
        started = in_flight.pop(self._ticket(done), None)
        if started is None:
            return 0.0
        end, communication = started
        wait = max(0.0, end - now)
        if communication is not None:
            communication.exposed += wait * times
        if wait:
            bound = "communication" if communication is not None else "memory"
            self.costs.append(Cost(wait * times, bound, done, times))
        return wait

    def _ticket(self, instruction: Instruction) -> str:
        """What the start and the end of something under way have in common: a channel where a fusion wraps it, else the
        name of its start."""
        if instruction.name.startswith("async-collective-"):
            return self.program.collective(instruction).attribute("channel_id")
        return instruction.operands[0] if instruction.opcode.endswith("-done") else instruction.name

    def _communication(self, instruction: Instruction, collective: Instruction, times: int) -> Communication:
        kind, group = collective_kind(collective), group_size(collective)
        asynchronous = instruction.opcode.endswith(("-start", "-update")) or instruction.name.startswith(
            "async-collective-start"
        )
        moved = _whole_bytes(collective, kind, group)
        passes = 2 if kind == "all-reduce" else 1
        share = (group - 1) / group if kind != "collective-permute" else 1.0
        if kind == "all-to-all":
            share = 2 * self.slice.exchange_share(group)  # of two links
        seconds = passes * moved * share / (2 * self.chip.link_bandwidth)
        return Communication(kind, moved, group, times, asynchronous, seconds * times, 0.0, instruction.op_name)

    def _cost(self, instruction: Instruction, computation: str, times: int) -> tuple[float, str]:
        """Seconds of one run of an instruction, and what bounds it."""
        memory = memory_traffic(instruction, self.program, computation) / self._memory_bandwidth
        flops = matmul_flops(instruction, self.program, computation)
        if instruction.opcode == "custom-call":
            flops = self._kernel_flops(instruction, times)
        matmul = flops / (MATMUL_EFFICIENCY * self.chip.matmul_flops)
        cycles = self.cycles.get(instruction.name)
        if cycles is None and self.cycles:
            cycles = self.twins.get(self._signature(instruction, computation))
            if cycles is None and (cycles := instruction.cycles) is not None:
                self.unknown["instructions without dumped code, at the compiler's own estimate"] += times
        compute = max(matmul, (cycles or 0) / self.chip.clock)
        if memory > compute:
            return memory, "memory"
        return compute, "matmul" if flops else "vector"

    def _kernel_flops(self, instruction: Instruction, times: int) -> int:
        """Of a Pallas kernel, from the estimate that it was given when it was written."""
        if 'custom_call_target="tpu_custom_call"' not in instruction.text:
            return 0
        found = re.search(r'\\?"flops\\?":\s*\\?"?(\d+)', instruction.text)
        if found is None:
            if not self.cycles:
                self.unknown["kernels without an estimate of their operations, by their memory traffic alone"] += times
            return 0
        return int(found.group(1))


def _whole_bytes(collective: Instruction, kind: str, group: int) -> int:
    """Bytes of the arrays that a group has together: gathered ones, or those before they are scattered."""
    total, start = array_bytes(collective.type), collective.opcode.endswith("-start")
    if kind in ("all-gather", "reduce-scatter"):
        if start:  # the type holds both the whole and a device's part
            return total * group // (group + 1)
        return total * group if kind == "reduce-scatter" else total
    return total // 2 if start and kind != "all-reduce" else total


def describe(instruction: Instruction) -> str:
    """What an instruction makes and where it comes from, on one line."""
    dtype = instruction.type.strip().lstrip("(").split("[")[0]
    shape = ",".join(map(str, array_shape(instruction.type)))
    return f"{instruction.opcode} {dtype}[{shape}] {instruction.op_name.split('/', 1)[-1]}"
