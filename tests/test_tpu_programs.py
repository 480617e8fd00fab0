"""The compiled training step on TPU slices: what its chips send each other. Needs the TPU compiler, and no TPU."""

import math
import re
from collections.abc import Iterator

import pytest

from speech_flax.data.sources import DataSource
from speech_flax.training.experiment import DataSettings, Experiment, MeshSettings, ModelSettings
from speech_flax.training.hlo import Instruction, Program, array_shape, collective_kind, parse_program
from speech_flax.training.preflight_plan import BucketShape
from speech_flax.training.step_compiler import compile_step
from speech_flax.training.tpu_slices import parse_slice

pytestmark = pytest.mark.tpu

LAYERS = 2
SECONDS = 20.4
FRAMES = 1019  # of feature frames in that time: a prime, which divides the dimensions of activations and no others
WHOLE_WEIGHT = 1024 * 1024  # elements of the smallest matrix of a layer; all are sharded under fsdp
TRAVELS = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")


@pytest.fixture(scope="module", params=["v5e:4x4", "v5p:2x2x2", "v6e:2x4"])
def program(request) -> Program:
    """The step of a shallow Wav2Vec2-BERT of real width, with parameters sharded over all chips, two rows on each."""
    slice_ = parse_slice(request.param)
    experiment = Experiment(
        DataSettings(DataSource("owner/corpus", max_seconds=SECONDS), num_buckets=1),
        "runs/none",
        model=ModelSettings(config={"num_hidden_layers": LAYERS, "layerdrop": 0.0}, dtype="bfloat16", remat="dots"),
        mesh=MeshSettings(data=1, fsdp=-1),
    )
    shape = BucketShape(SECONDS, 2 * slice_.num_chips, 512, 1.0)
    step = compile_step(experiment, slice_, shape, machine_code=False)
    assert step.text, f"{step.peak_bytes} bytes do not fit"
    return parse_program(step.text)


def communications(program: Program, *kinds: str) -> Iterator[tuple[Instruction, list[tuple[int, ...]]]]:
    """Instructions that communicate, those of loops and branches included, and the shapes that they move."""
    for _, instruction, _ in program.walk():
        collective = program.collective(instruction)
        if collective is not None and collective_kind(collective) in kinds:
            arrays = re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", collective.type)
            yield collective, [tuple(int(size) for size in shape.split(",") if size) for shape in arrays]


def test_activations_stay_where_their_rows_are(program):
    moved = [
        f"{instruction.opcode} {instruction.type} {instruction.op_name}"
        for instruction, shapes in communications(program, *TRAVELS)
        if any(size % FRAMES == 0 for shape in shapes for size in shape)
    ]
    assert not moved


def test_kernels_take_states_as_they_lie(program):
    """Nothing is padded, turned or copied for them, but for what is computed again in the backward pass."""
    moved = [
        f"{instruction.opcode} {instruction.type} {instruction.op_name}"
        for _, instruction, _ in program.walk()
        if instruction.opcode in ("copy", "pad", "transpose")
        if "/self_attn/" in instruction.op_name or "/depthwise_conv/" in instruction.op_name
        if "rematted" not in instruction.op_name and math.prod(array_shape(instruction.type)) >= 2 * FRAMES * 1024
    ]
    assert not moved


def test_no_gradient_of_a_sharded_weight_is_reduced_whole(program):
    whole = [
        f"{instruction.type} {instruction.op_name}"
        for instruction, shapes in communications(program, "all-reduce")
        if any(math.prod(shape) >= WHOLE_WEIGHT for shape in shapes)
    ]
    assert not whole


def test_gradients_are_summed_in_float32(program):
    sums = [
        instruction.type
        for instruction, _ in communications(program, "all-to-all", "reduce-scatter")
        if "sum_scatter" in instruction.op_name
    ]
    assert len(sums) >= 10 and all(type_.strip().lstrip("(").startswith("f32") for type_ in sums)


def test_backward_pass_computes_no_product_no_attention_and_no_convolution_again(program):
    instructions = [instruction for body in program.computations.values() for instruction in body]
    products = [
        one.op_name for one in instructions if one.opcode in ("dot", "convolution") and "dot_gen" in one.op_name
    ]
    assert products and not [name for name in products if "rematted_computation" in name]
    kernels = [one for _, one, times in program.walk() for _ in range(times) if "tpu_custom_call" in one.text]
    for module in ("self_attn", "depthwise_conv"):
        assert sum(f"/{module}/" in one.op_name for one in kernels) == 2 * LAYERS  # forward and backward


def test_sums_of_gradients_go_on_beside_other_work(program):
    of_weights = [
        one
        for _, one, _ in program.walk()
        if "/layers/" in one.op_name and (sent := program.collective(one))
        if collective_kind(sent) in ("all-to-all", "reduce-scatter")
    ]
    waited_for = [one.text[:200] for one in of_weights if not one.opcode.endswith("-start")]
    assert len(of_weights) >= 10 and not waited_for


@pytest.mark.parametrize("program", ["v6e:2x4"], indirect=True)
def test_sparse_cores_gather_weights_and_sum_gradients_beside_other_work(program):
    of_weights = [  # sums of what is not sharded, as of biases, are small
        one
        for _, one, _ in program.walk()
        if "/layers/" in one.op_name and (sent := program.collective(one)) and collective_kind(sent) in TRAVELS
    ]
    assert len(of_weights) >= 3 * 10  # ten matrices: gathered twice, and the sum of their gradients
    assert {one.opcode for one in of_weights} == {"async-start"}
    assert all('async_execution_thread="sparsecore"' in one.text for one in of_weights)


def test_weights_do_travel(program):
    """Without it the tests above would pass on a program that shards nothing."""
    names = [instruction.op_name for instruction, _ in communications(program, *TRAVELS)]
    assert sum("/layers/" in name and "intermediate_dense" in name for name in names) >= 4
