"""Compiled programs as text: shapes, groups, loops, and what they cost, counted by hand."""

import numpy as np
import pytest

from jaxalign.plan.costs import attention_flops, count_costs
from jaxalign.plan.hlo import Shape, parse, replica_groups

PROGRAM = """HloModule jit_run, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: bf16[5,64,32], p1: s32[]) -> bf16[64,32] {
  %p0 = bf16[5,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%cut)
}

%body (s: (s32[], bf16[16,64], bf16[5,64,32])) -> (s32[], bf16[16,64], bf16[5,64,32]) {
  %s = (s32[], bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%s), index=1
  %w = bf16[5,64,32]{2,1,0} get-tuple-element(%s), index=2
  %one = bf16[64,32]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %whole = bf16[64,256]{1,0} all-gather(%one), replica_groups=[1,8]<=[8], dimensions={1}
  %y = bf16[16,256]{1,0} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %by = s32[] constant(1)
  %next = s32[] add(%i, %by)
  ROOT %t = (s32[], bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) tuple(%next, %x, /*index=2*/%w)
}

%test (s: (s32[], bf16[16,64], bf16[5,64,32])) -> pred[] {
  %s.1 = (s32[], bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[16,64], w: bf16[5,64,32]) -> f32[16] {
  %x.0 = bf16[16,64]{1,0} parameter(0)
  %w.0 = bf16[5,64,32]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %state = (s32[], bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) tuple(%start, %x.0, %w.0)
  %loop = (s32[], bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) while(%state), condition=%test, body=%body
  %z = f32[16]{0} constant({...})
  ROOT %r = f32[16]{0} all-reduce(%z), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_costs_of_a_loop_by_hand():
    costs = count_costs(PROGRAM, [0] * 4 + [1] * 4)
    assert costs.flops == 5 * 2 * 16 * 256 * 64
    # A turn: the slice read and written, the gather's share and result, both factors and product,
    # and four scalars.
    turn = 2 * 4096 + (4096 + 32768) + (2048 + 32768 + 8192) + 4 * 4
    assert costs.bytes == 5 * turn + 2 * 64
    gather, reduce = costs.collectives["all-gather"], costs.collectives["all-reduce"]
    # 4,096 bytes from each of 8: of the 7 shares received, between nodes one a counterpart.
    assert (gather.count, gather.inner + gather.outer) == (5, 5 * 7 * 4096)
    assert gather.outer == 5 * 4096
    assert (reduce.count, reduce.inner, reduce.outer) == (1, 2 * 64 * 3 / 4, 0)


def test_loops_that_end_at_run_time():
    text = PROGRAM.replace("compare(%i.1, %limit)", "compare(%i.1, %i.1)")
    assert count_costs(text, [0] * 8, trips=3).flops == 3 * 2 * 16 * 256 * 64
    told = PROGRAM.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert count_costs(told, [0] * 8).flops == 7 * 2 * 16 * 256 * 64


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
    ],
)
def test_groups(text, want):
    np.testing.assert_array_equal(replica_groups(text, 4), want)


def test_a_permute_between_nodes():
    text = PROGRAM.replace(
        "all-reduce(%z), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
        "collective-permute(%z), "
        "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}",
    )
    permute = count_costs(text, [0] * 4 + [1] * 4).collectives["collective-permute"]
    assert (permute.inner, permute.outer) == (64 * 6 / 8, 64 * 2 / 8)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("bf16[4,8] convolution(%a, %b), dim_labels=bf_io->bf|bf16[4,6]|bf16[6,8]", 2 * 4 * 8 * 6),
        # As the TPU compiler writes 3 batched products [4, 6] · [6, 8]: kernel positions that meet
        # holes do nothing.
        (
            "f32[3,4,8] convolution(%a, %b), window={size=3 stride=2 lhs_dilate=3}, "
            "dim_labels=0bf_0io->0bf|bf16[3,4,6]|bf16[3,6,8]",
            3 * 2 * 4 * 8 * 6,
        ),
    ],
)
def test_products_written_as_convolutions(line, flops):
    line, left, right = line.split("|")
    text = (
        f"HloModule x\n\nENTRY %main (a: {left}, b: {right}) -> f32[] {{\n"
        f"  %a = {left}{{1,0}} parameter(0)\n  %b = {right}{{1,0}} parameter(1)\n"
        f"  ROOT %c = {line}\n}}\n"
    )
    assert count_costs(text, [0]).flops == flops


def test_attention_kernels():
    """B 2, H 4, T = S 8, d 16: a product is 2·2·4·8·8·16 FLOPs, half of it below the diagonal."""
    product = 2 * 2 * 4 * 8 * 8 * 16 / 2
    split = [Shape("bf16", (2, 4, 8, 16), 0)] * 3
    joined = [Shape("bf16", (2, 8, 4, 16), 0)] * 3
    assert attention_flops("__cudnn$fmhaSoftmax", "", joined) == 2 * product
    assert attention_flops("__cudnn$fmhaSoftmaxBackward", "", joined) == 5 * product
    assert attention_flops("tpu_custom_call", 'op_name="splash_mha_fwd"', split) == 2 * product
    assert attention_flops("tpu_custom_call", 'op_name="splash_mha_dkv"', split) == 4 * product
    for kernel, products in (("forward", 2), ("to_queries", 3), ("to_keys", 4)):
        name = f'op_name="jit(step)/flash_{kernel}/pallas_call"'
        assert attention_flops("__gpu$xla.gpu.triton", name, joined) == products * product
    assert attention_flops("__gpu$xla.gpu.triton", 'op_name="other"', joined) == 0
    assert attention_flops("Sharding", "", split) == 0


NESTED = """HloModule jit_run

%inner (a: bf16[5,64,32]) -> bf16[64,32] {
  %a = bf16[5,64,32]{2,1,0} parameter(0)
  %cut = bf16[1,64,32]{2,1,0} slice(%a), slice={[2:3], [0:64], [0:32]}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%cut)
}

%outer (w: bf16[5,64,32], x: bf16[16,64]) -> bf16[16,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  %x = bf16[16,64]{1,0} parameter(1)
  %one = bf16[64,32]{1,0} fusion(%w), kind=kLoop, calls=%inner
  ROOT %y = bf16[16,32]{1,0} dot(%x, %one), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%scatter (z: bf16[64,32], at: s32[]) -> bf16[8,32] {
  %z = bf16[64,32]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %sum = bf16[64,32]{1,0} all-reduce(%z), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %part = bf16[8,32]{1,0} dynamic-slice(%sum, %at, %zero), dynamic_slice_sizes={8,32}
}

ENTRY %main (w.0: bf16[5,64,32], x.0: bf16[16,64], z.0: bf16[64,32], at.0: s32[]) -> bf16[8,32] {
  %w.0 = bf16[5,64,32]{2,1,0} parameter(0)
  %x.0 = bf16[16,64]{1,0} parameter(1)
  %z.0 = bf16[64,32]{1,0} parameter(2)
  %at.0 = s32[] parameter(3)
  %y.0 = bf16[16,32]{1,0} fusion(%w.0, %x.0), kind=kOutput, calls=%outer
  ROOT %r = bf16[8,32]{1,0} fusion(%z.0, %at.0), kind=kCustom, calls=%scatter
}
"""


def test_a_kernel_within_a_kernel_reads_its_slice_only():
    costs = count_costs(NESTED, [0] * 8)
    slice_, x, y, z, at, part = 64 * 32 * 2, 16 * 64 * 2, 16 * 32 * 2, 64 * 32 * 2, 4, 8 * 32 * 2
    assert costs.bytes == slice_ + x + y + z + at + part


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
    sent = count_costs(NESTED, [0] * 8).collectives
    assert set(sent) == {"reduce-scatter"}
    assert (sent["reduce-scatter"].count, sent["reduce-scatter"].inner) == (1, 64 * 32 * 2 * 7 / 8)


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no text that we can read"):
        parse("HloModule x\n")


def test_a_kernel_whose_metadata_have_line_breaks():
    """As libtpu writes splash attention, whose options name all three kernels."""
    shape = "bf16[2,4,8,16]{3,2,1,0}"
    text = (
        f"HloModule x\n\nENTRY %main (a: bf16[2,4,8,16]) -> bf16[2,4,8,16] {{\n"
        f"  %a = {shape} parameter(0)\n"
        f'  ROOT %k = {shape} custom-call(%a, %a, %a), custom_call_target="tpu_custom_call", '
        "frontend_attributes={kernel_metadata={\n"
        '"xprof_metadata":"{\\"block_q_dkv\\": 512, \\"block_q_dq\\": 512}"\n'
        '}}, metadata={op_name="jit(run)/splash_mha_fwd_segmented/pallas_call"}\n}\n'
    )
    assert count_costs(text, [0]).flops == 2 * 2 * 2 * 4 * 8 * 8 * 16 / 2
