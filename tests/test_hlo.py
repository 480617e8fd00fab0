"""Reading compiled programs: instructions, bytes, operations, and the time they are estimated to take."""

# ruff: noqa: E501 - a line of a compiled program is as long as it is

import dataclasses

import pytest

from speech_flax.training.bundles import count_cycles, read_cycles
from speech_flax.training.estimate import COLLECTIVE_LATENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, estimate
from speech_flax.training.hlo import array_bytes, collective_kind, group_size, matmul_flops, parse_program
from speech_flax.training.tpu_slices import SliceError, parse_slice

SLICE = parse_slice("v5e:4x4")
CHIP = SLICE.chip

# In the form of the compiler's output: a loop of 3 runs with a product, a gather that the product hides, an all-reduce,
# and a conditional with one empty branch.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_product (parameter.0: bf16[1024,1024], parameter.1: bf16[1024,4096]) -> bf16[1024,4096] {
  %parameter.0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %parameter.1 = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[1024,4096]{1,0:T(8,128)(2,1)} convolution(%parameter.0, %parameter.1), dim_labels=bf_io->bf
}

%fused_slice (parameter.2: f32[24,1024], parameter.3: s32[]) -> f32[1,1024] {
  %parameter.2 = f32[24,1024]{1,0:T(8,128)} parameter(0)
  %parameter.3 = s32[] parameter(1)
  %constant.9 = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%parameter.2, %parameter.3, %constant.9), dynamic_slice_sizes={1,1024}
}

%body (carry: (s32[], bf16[1024,1024], bf16[1024,256], bf16[1024,4096])) -> (s32[], bf16[1024,1024]) {
  %carry = (s32[], bf16[1024,1024]{1,0}, bf16[1024,256]{1,0}, bf16[1024,4096]{1,0}) parameter(0)
  %x = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %shard = bf16[1024,256]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %weight = bf16[1024,4096]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=3
  %all-gather-start = (bf16[1024,256]{1,0}, bf16[1024,4096]{1,0}) all-gather-start(%shard), channel_id=1, replica_groups=[1,16]<=[16], dimensions={1}, metadata={op_name="jit(step)/gather"}
  %fusion.1 = bf16[1024,4096]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %weight), kind=kOutput, calls=%fused_product, metadata={op_name="jit(step)/product"}, backend_config={"estimated_cycles":"100"}
  %all-gather-done = bf16[1024,4096]{1,0} all-gather-done(%all-gather-start)
  %all-reduce.1 = f32[1024,1024]{1,0} all-reduce(%fusion.1), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %tuple = (s32[], bf16[1024,1024]{1,0}) tuple(%x)
}

%condition (carry.1: (s32[], bf16[1024,1024])) -> pred[] {
  %carry.1 = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%carry.1), index=0
  %constant.3 = s32[]{:T(128)} constant(3)
  ROOT %compare = pred[] compare(%index, %constant.3), direction=LT
}

%skipped (parameter.4: f32[256,1024]) -> f32[256,1024] {
  ROOT %parameter.4 = f32[256,1024]{1,0} parameter(0)
}

%taken (parameter.5: f32[256,1024]) -> f32[256,1024] {
  %parameter.5 = f32[256,1024]{1,0} parameter(0)
  ROOT %negate = f32[256,1024]{1,0} negate(%parameter.5)
}

ENTRY %main (p: f32[256,1024], stack: f32[24,1024]) -> f32[256,1024] {
  %p = f32[256,1024]{1,0} parameter(0)
  %stack = f32[24,1024]{1,0} parameter(1)
  %init = (s32[], bf16[1024,1024]{1,0}, bf16[1024,256]{1,0}, bf16[1024,4096]{1,0}) tuple(%p)
  %one = s32[] constant(1)
  %while = (s32[], bf16[1024,1024]{1,0}) while(%init), condition=%condition, body=%body
  %fusion.2 = f32[1,1024]{1,0:T(1,128)} fusion(%stack, %one), kind=kLoop, calls=%fused_slice
  ROOT %conditional = f32[256,1024]{1,0} conditional(%one, %p, %p), branch_computations={%skipped, %taken}
}
"""

GATHERED = 1024 * 4096 * 2  # bytes
PRODUCT = 2 * 1024 * 1024 * 4096  # floating-point operations


def test_bytes_leave_out_what_stays_on_the_chip():
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)}, f32[], pred[5])") == 12 + 4 + 5
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)S(1)}, f32[4]{0})", main_memory=True) == 16


def test_the_program_is_read_as_it_is_scheduled():
    program = parse_program(PROGRAM)
    assert program.entry == "main"
    by_name = {instruction.name: (instruction, times) for _, instruction, times in program.walk()}
    gather, times = by_name["all-gather-start"]
    assert times == 3 and program.collective(gather) is gather and gather.operands == ("shard",)
    assert collective_kind(gather) == "all-gather" and program.collective(by_name["negate"][0]) is None
    assert group_size(gather) == 16 and group_size(by_name["all-reduce.1"][0]) == 4
    assert by_name["fusion.1"][0].op_name == "jit(step)/product" and by_name["fusion.1"][0].cycles == 100
    assert by_name["negate"][1] == 1
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_program("HloModule nothing")


@pytest.mark.parametrize(
    ("instruction", "left", "right", "expected"),
    [
        ("f32[8,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", "8,4", "4,16", 2 * 8 * 4 * 16),
        ("f32[2,8,16] dot(%a, %b), lhs_contracting_dims={2}", "2,8,4", "2,4,16", 2 * 2 * 8 * 4 * 16),
        # A convolution of width 3 with padding 1: the first and the last output have two taps.
        ("f32[2,10,6] convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", "2,10,4", "3,4,6", 2 * 2 * 4 * 6 * 28),
        # Depthwise: as many groups as channels.
        ("f32[2,8,4] convolution(%a, %b), window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=4", "2,10,4", "3,1,4", 2 * 2 * 4 * 8 * 3),
        # A batched product, written as a convolution with dilated inputs: one tap for each of 5 outputs.
        ("f32[5,8,16] convolution(%a, %b), window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf", "5,8,4", "5,4,16", 2 * 5 * 8 * 4 * 16),
    ],
)  # fmt: skip
def test_operations_of_products_and_convolutions(instruction, left, right, expected):
    text = f"ENTRY %main (a: f32[1]) -> f32[1] {{\n  %a = f32[{left}] parameter(0)\n  %b = f32[{right}] parameter(1)\n"
    program = parse_program(f"{text}  ROOT %result = {instruction}\n}}\n")
    assert matmul_flops(program.computations["main"][-1], program, "main") == expected


def test_the_estimate_adds_up_the_schedule():
    result = estimate(parse_program(PROGRAM), SLICE)
    product = PRODUCT / (MATMUL_EFFICIENCY * CHIP.matmul_flops)  # all its arrays are on the chip
    gather = GATHERED * 15 / 16 / (2 * CHIP.link_bandwidth) + COLLECTIVE_LATENCY
    reduction = 2 * 1024 * 1024 * 4 * 3 / 4 / (2 * CHIP.link_bandwidth) + COLLECTIVE_LATENCY
    bandwidth = MEMORY_EFFICIENCY * CHIP.memory_bandwidth
    slice_seconds = (1024 * 4 + 4 + 1024 * 4) / bandwidth  # the slice and its index are read, not the stack
    negate = 2 * 256 * 1024 * 4 / bandwidth  # the longer branch
    assert gather > product
    expected = 3 * (gather + reduction) + slice_seconds + negate
    assert result.seconds == pytest.approx(expected, rel=1e-6)
    one, two = result.summed_communications()
    assert (one["kind"], one["devices"], one["times"], one["asynchronous"]) == ("all-gather", 16, 3, True)
    assert one["exposed"] == pytest.approx(3 * (gather - product)) and two["exposed"] == pytest.approx(3 * reduction)
    assert result.by_bound["matmul"] == pytest.approx(3 * product)
    assert sum(result.by_bound.values()) == pytest.approx(result.seconds)
    assert "product" in next(cost["what"] for cost in result.costliest() if cost["bound"] == "matmul")


# A gather that the compiler has other work carry on: what starts it and what waits for it are fusions around it.
FUSED_GATHER = """HloModule jit_step, is_scheduled=true

%start (shard.1: bf16[1024,256]) -> (bf16[1024,256], bf16[1024,4096]) {
  %shard.1 = bf16[1024,256]{1,0} parameter(0)
  %gather.1 = bf16[1024,4096]{1,0} all-gather(%shard.1), channel_id=7, replica_groups=[1,16]<=[16], dimensions={1}
  ROOT %started = (bf16[1024,256]{1,0}, bf16[1024,4096]{1,0}) custom-call(%shard.1, %gather.1), custom_call_target="start"
}

%finish (shard.2: bf16[1024,256], whole.2: bf16[1024,4096]) -> bf16[1024,4096] {
  %shard.2 = bf16[1024,256]{1,0} parameter(0)
  %whole.2 = bf16[1024,4096]{1,0} parameter(1)
  %gather.2 = bf16[1024,4096]{1,0} all-gather(%shard.2), channel_id=7, replica_groups=[1,16]<=[16], dimensions={1}
  ROOT %finished = bf16[1024,4096]{1,0} custom-call(%gather.2), custom_call_target="done"
}

ENTRY %main (shard: bf16[1024,256], x: f32[512,1024]) -> bf16[1024,4096] {
  %shard = bf16[1024,256]{1,0:S(1)} parameter(0)
  %x = f32[512,1024]{1,0} parameter(1)
  %permute = (f32[512,1024]{1,0:S(1)}, f32[512,1024]{1,0:S(1)}) collective-permute-start(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %async-collective-start.3 = (bf16[1024,256]{1,0:S(1)}, bf16[1024,4096]{1,0:S(1)}) fusion(%shard), kind=kCustom, calls=%start
  %work = f32[512,1024]{1,0} negate(%x)
  %permuted = f32[512,1024]{1,0:S(1)} collective-permute-done(%permute)
  ROOT %async-collective-done.5 = bf16[1024,4096]{1,0:S(1)} fusion(%async-collective-start.3), kind=kCustom, calls=%finish
}
"""


def test_communications_share_the_links_and_may_be_fused_with_other_work():
    result = estimate(parse_program(FUSED_GATHER), SLICE)
    permute = 512 * 1024 * 4 / CHIP.link_bandwidth  # over one link, and half of what there is
    gather = GATHERED * 15 / 16 / (2 * CHIP.link_bandwidth)
    assert [(one.kind, one.asynchronous, one.group) for one in result.communications] == [
        ("collective-permute", True, 1),
        ("all-gather", True, 16),
    ]
    assert result.seconds == pytest.approx(permute / 2 + gather + COLLECTIVE_LATENCY)  # one after the other
    assert sum(one.exposed for one in result.communications) == pytest.approx(result.by_bound["communication"])


def test_what_all_send_to_all_passes_the_middle_of_the_slice():
    text = """HloModule jit_step, is_scheduled=true

ENTRY %main (terms: f32[1024,1024]) -> f32[1024,1024] {
  %terms = f32[1024,1024]{1,0} parameter(0)
  ROOT %exchange = f32[1024,1024]{1,0} all-to-all(%terms), channel_id=3, replica_groups=[GROUPS]<=[256], dimensions={0}
}
"""
    sent, link = 1024 * 1024 * 4, CHIP.link_bandwidth

    def seconds(slice_: str, groups: str) -> float:
        (one,) = estimate(parse_program(text.replace("GROUPS", groups)), parse_slice(slice_)).communications
        return one.seconds

    # Of 4 x 4 chips, 8 send half of their terms to the others over 4 links; ends of 16 are joined by another link.
    assert seconds("v5e:4x4", "1,16") == pytest.approx(8 * sent / 2 / 4 / link)
    assert seconds("v5e:16x16", "16,16") == pytest.approx(8 * sent / 2 / 2 / link)  # one line of the slice
    assert seconds("v5e:16x16", "1,256") == pytest.approx(128 * sent / 2 / 32 / link)
    assert seconds("v5p:2x2x2", "1,8") == pytest.approx(4 * sent / 2 / 4 / (2 * link))


def test_a_sum_that_a_fusion_wraps_is_waited_for():
    text = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (gradient.1: f32[1024,1024]) -> f32[256,1024] {
  %gradient.1 = f32[1024,1024]{1,0} parameter(0)
  %sum.1 = f32[1024,1024]{1,0} all-reduce(%gradient.1), channel_id=3, replica_groups={{0,1,2,3}}
  ROOT %part.1 = f32[256,1024]{1,0} slice(%sum.1), slice={[0:256], [0:1024]}
}

ENTRY %main (gradient: f32[1024,1024]) -> f32[256,1024] {
  %gradient = f32[1024,1024]{1,0} parameter(0)
  ROOT %fusion.4 = f32[256,1024]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,) = estimate(parse_program(text), SLICE).communications
    assert (one.kind, one.asynchronous, one.bytes) == ("all-reduce", False, 1024 * 1024 * 4)


# A gather on a core of its own, which is made ready before it gets what to send.
OFFLOADED_GATHER = """HloModule jit_step, is_scheduled=true

%called (shard.1: bf16[1024,256]) -> bf16[1024,4096] {
  %shard.1 = bf16[1024,256]{1,0} parameter(0)
  ROOT %gather.1 = bf16[1024,4096]{1,0} all-gather(%shard.1), channel_id=7, replica_groups=[1,16]<=[16], dimensions={1}
}, execution_thread="sparsecore"

%offloaded (shard.2: bf16[1024,256]) -> bf16[1024,4096] {
  %shard.2 = bf16[1024,256]{1,0} parameter(0)
  ROOT %custom-call = bf16[1024,4096]{1,0} custom-call(%shard.2), custom_call_target="offload", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (shard: bf16[1024,256], x: f32[512,1024]) -> f32[512,1024] {
  %shard = bf16[1024,256]{1,0} parameter(0)
  %x = f32[512,1024]{1,0} parameter(1)
  %call-start = ((), (), s32[8192]{0}) async-start(), async_execution_thread="sparsecore", calls=%offloaded
  %before = f32[512,1024]{1,0} negate(%x)
  %call-update = ((bf16[1024,256]{1,0}), bf16[1024,4096]{1,0}, s32[8192]{0}) async-update(%call-start, %shard)
  %meanwhile = f32[512,1024]{1,0} negate(%before)
  %call-done = bf16[1024,4096]{1,0} async-done(%call-update)
  ROOT %after = f32[512,1024]{1,0} negate(%meanwhile)
}
"""


def test_a_gather_on_a_core_of_its_own_begins_when_it_gets_what_to_send():
    result = estimate(parse_program(OFFLOADED_GATHER), SLICE)
    work = 2 * 512 * 1024 * 4 / (MEMORY_EFFICIENCY * CHIP.memory_bandwidth)
    gather = GATHERED * 15 / 16 / (2 * CHIP.link_bandwidth) + COLLECTIVE_LATENCY
    (one,) = result.communications
    assert (one.kind, one.asynchronous, one.bytes, one.times) == ("all-gather", True, GATHERED, 1)
    assert work < gather and one.exposed == pytest.approx(gather - work)
    assert result.seconds == pytest.approx(work + gather + work)


def test_counted_cycles_replace_the_lower_bound():
    program = parse_program(PROGRAM)
    slow = dataclasses.replace(SLICE, chip=dataclasses.replace(CHIP, link_bandwidth=1e30))
    quick, detailed = estimate(program, slow), estimate(program, slow, {"negate": 10_000_000, "fusion.1": 1})
    assert detailed.by_bound["vector"] == pytest.approx(10_000_000 / CHIP.clock)
    assert detailed.by_bound["matmul"] == quick.by_bound["matmul"]


def test_kernels_count_by_the_estimate_that_they_carry():
    call = (
        "ENTRY %main (a: f32[1]) -> f32[1] {\n  %a = f32[8]{0} parameter(0)\n  ROOT %kernel = f32[8]{0} "
        'custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{COST}}\n}\n'
    )
    cost = '"cost_estimate":{"flops":1970000000,"transcendentals":0,"bytes_accessed":64}'
    known = estimate(parse_program(call.replace("COST", cost)), SLICE)
    assert known.seconds == pytest.approx(1e-5 / MATMUL_EFFICIENCY) and not known.unknown
    assert estimate(parse_program(call.replace("COST", "")), SLICE).unknown


def test_room_that_is_only_set_aside_costs_nothing():
    room = (
        "ENTRY %main () -> f32[1048576] {\n"
        '  ROOT %room = f32[1048576]{0} custom-call(), custom_call_target="AllocateBuffer"\n}\n'
    )
    assert estimate(parse_program(room), SLICE).seconds == 0
    assert estimate(parse_program(room.replace("AllocateBuffer", "Zeros")), SLICE).seconds > 0


BUNDLES = """
// machine code
     0x0   :  { %s0 = smov 0  ;; Start region 1 }
     0x1   :  { %p1 = scmp.lt.s32.totalorder %s0, 8 /* loop exit test */ }
     0x2 LB: > { vdelay 3 }
     0x3   :  { sbr.rel (%p1) target = $region1 }
     0x4   :  { shalt }
"""


def test_cycles_count_bundles_delays_and_runs_of_loops(tmp_path):
    assert count_cycles(BUNDLES.splitlines()) == 8 * (4 + 3) + 1
    assert count_cycles(BUNDLES.replace("%s0, 8", "%s0, %s9").splitlines()) is None
    predicated = BUNDLES.replace("totalorder %s0", "totalorder (%p2), %s0")  # of a loop around others
    assert count_cycles(predicated.splitlines()) == count_cycles(BUNDLES.splitlines())
    (tmp_path / "17-fusion.3-42-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "17-fusion.3-41-schedule-analysis_final_bundles.txt").write_text(BUNDLES)
    assert read_cycles(tmp_path) == {"fusion.3": 57}


def test_slices_have_names():
    slice_ = parse_slice("v5p:2x4x4")
    assert (slice_.chip.name, slice_.num_chips, slice_.name) == ("v5p", 32, "v5p:2x4x4")
    for name in ("v4:2x2x2", "v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "v5e:axb"):
        with pytest.raises(SliceError) as caught:
            parse_slice(name)
        assert name in str(caught.value) and "as in v5" in str(caught.value)
