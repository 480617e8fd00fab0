"""Cycles of every instruction, from the final machine code that the TPU compiler dumps."""

import bisect
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_REGION = re.compile(r"Start region (\d+)")
_EXIT_TEST = re.compile(r"(%\S+) = scmp\.\w+\.\w+\.totalorder (?:\(\S+\), )?[^,]*, (\S+?)\s*/\* loop exit test")
_BRANCH = re.compile(r"sbr\.rel \(!?(%\S+?)\) target = \$region(\d+)")
_DELAY = re.compile(r"vdelay[^0-9]*(\d+)")
_FILE = re.compile(r"\d+-(.*)-\d+-final_bundles\.txt")


def count_cycles(lines: Iterable[str]) -> int | None:
    """Cycles of a dumped routine: bundles times the runs of the loops around them; ``None`` if a loop's runs are not a
    constant."""
    bundle = -1
    regions: dict[str, int] = {}
    tests: list[tuple[int, str, int | None]] = []
    branches: list[tuple[int, str, str]] = []
    delays: dict[int, int] = {}
    for line in lines:
        bundle += bool(_BUNDLE.match(line))
        if bundle < 0:
            continue
        for region in _REGION.findall(line):
            regions.setdefault(region, bundle)
        for predicate, bound in _EXIT_TEST.findall(line):
            tests.append((bundle, predicate, int(bound) if bound.isdigit() else None))
        branches += [(bundle, predicate, region) for predicate, region in _BRANCH.findall(line)]
        if delay := _DELAY.search(line):
            delays[bundle] = int(delay.group(1))
    loops = []
    for end, predicate, region in branches:
        start = regions.get(region)
        if start is None or start > end:
            continue  # a branch forwards skips code, it makes no loop
        inside = [test for test in tests if start <= test[0] <= end]
        own = [test for test in inside if test[1] == predicate] or inside[-1:]
        if not own or own[-1][2] is None:
            return None
        loops.append((start, end, own[-1][2]))
    return _sum_over_loops(bundle + 1, loops, delays)


def _sum_over_loops(num_bundles: int, loops: list[tuple[int, int, int]], delays: dict[int, int]) -> int:
    borders = sorted({0, num_bundles, *(start for start, _, _ in loops), *(end + 1 for _, end, _ in loops)})
    delayed = sorted(delays)
    total = 0
    for left, right in itertools.pairwise(borders):
        runs = 1
        for start, end, times in loops:
            runs *= times if start <= left and right - 1 <= end else 1
        waits = delayed[bisect.bisect_left(delayed, left) : bisect.bisect_left(delayed, right)]
        total += runs * (right - left + sum(delays[bundle] for bundle in waits))
    return total


def read_cycles(directory: Path) -> dict[str, int]:
    """Cycles by the name of the instruction, of all routines dumped to ``directory`` that have constant loops."""
    cycles = {}
    for path in directory.glob("*final_bundles.txt"):
        named = _FILE.fullmatch(path.name)
        if named and "schedule-analysis" not in path.name and "gap_analysis" not in path.name:
            with path.open() as lines:
                counted = count_cycles(lines)
            if counted is not None:
                cycles[named.group(1)] = counted
    return cycles
