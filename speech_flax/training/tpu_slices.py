"""TPU slices: what their chips can do, and the compiler for them, which needs no TPU."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import jax


class SliceError(ValueError):
    """A slice that does not exist, or whose compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip, which is one device of JAX.

    Args:
        name: As slices are named.
        matmul_flops: Peak of bfloat16 matrix products [FLOP/s].
        memory_bytes: High-bandwidth memory that a program can use [bytes]; what the compiler itself enforces.
        memory_bandwidth: Bytes per second between that memory and the chip.
        clock: Cycles per second at which the matrix units reach ``matmul_flops``.
        link_bandwidth: Bytes per second over one link to a neighbour, in one direction.
        dimensions: Of the network between chips.
    """

    name: str
    matmul_flops: float
    memory_bytes: float
    memory_bandwidth: float
    clock: float
    link_bandwidth: float
    dimensions: int


#: Peaks and bandwidths as Google publishes them (cloud.google.com/tpu/docs); clocks follow from peaks and array sizes.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * 2**30, 819e9, 1.5e9, 45e9, 2),
        Chip("v5p", 459e12, 95.74 * 2**30, 2765e9, 1.75e9, 90e9, 3),
        Chip("v6e", 918e12, 31.25 * 2**30, 1640e9, 1.75e9, 90e9, 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice: its kind of chip and how many of them there are in each direction."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    def exchange_share(self, devices: int) -> float:
        """How much of what each of ``devices`` chips sends to all of them in equal parts goes over the busiest link.

        A quarter of the number of chips along the longest axis, an eighth where its ends are joined: half of what there
        is on one side goes to the other. Chips that are not the whole slice are taken to lie in one line.
        """
        longest = max(self.shape) if devices == self.num_chips else devices
        joined = longest % (16 if self.chip.dimensions == 2 else 4) == 0
        return longest / (8 if joined else 4)


def parse_slice(name: str) -> Slice:
    """The slice of a name like ``v5e:4x4`` or ``v5p:2x2x2``.

    Raises:
        SliceError: the name is not that of a kind of slice that is known.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise SliceError(f"--preflight {name}: there is no chip {kind!r}; known are {', '.join(CHIPS)}, as in v5e:4x4")
    chip = CHIPS[kind]
    sizes = tuple(int(size) for size in shape.split("x")) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else ()
    if len(sizes) != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise SliceError(
            f"--preflight {name}: a {kind} slice has {chip.dimensions} sizes, as in {kind}:{example}, not {shape!r}"
        )
    return Slice(chip, sizes)


def prepare_compiler(*, programs: Path | None = None, machine_code: Path | None = None) -> None:
    """Set up this process to compile for TPUs that it does not have; it then computes on the CPU alone.

    To be called before JAX looks for devices: the TPU library reads its environment once, when it is loaded.

    Args:
        programs: Directory to which the compiler writes the programs that it optimised, and how they use memory.
        machine_code: Directory to which it writes its final instructions.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or it asks the network which TPU this machine has
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_WORKER_ID"] = "0"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no device is opened, so that there is nothing to lock
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    if programs is not None:
        _add_to_environment("XLA_FLAGS", f"--xla_dump_to={programs}", "--xla_dump_hlo_as_text")
    if machine_code is not None:
        _add_to_environment(
            "LIBTPU_INIT_ARGS",
            f"--xla_jf_dump_to={machine_code}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=^final_bundles$",
        )


def _add_to_environment(name: str, *flags: str) -> None:
    os.environ[name] = " ".join([os.environ.get(name, ""), *flags]).strip()


def slice_devices(slice_: Slice) -> list[Any]:
    """Descriptions of the slice's devices, to make a mesh of and compile for.

    Raises:
        SliceError: the TPU compiler is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401 - JAX finds it itself, but does not say what to install
    except ImportError:
        raise SliceError(
            "--preflight needs the TPU compiler, which is not installed: pip install 'speech_flax[tpu]'"
        ) from None
    try:
        topology = topologies.get_topology_desc(topology_name=slice_.name, platform="tpu")
    except Exception as error:  # the library's errors have no common type
        reason = " ".join(str(error).split())[:200]
        raise SliceError(f"--preflight {slice_.name}: the TPU compiler knows no such slice ({reason})") from None
    return list(topology.devices)
