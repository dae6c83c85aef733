"""Norms, the gated activation, rotation and the write into pages: compiled twins against the torch ones."""

from __future__ import annotations

import pytest
import torch

from nanokv.codecs import resolve_codec
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.kernels import cpu, ops, reference
from nanokv.kernels.reference.attention import plane_view

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16)]  # activations, weights
ROWS = [1, 2, 3, 7, 64, 500]
WIDTHS = [8, 33, 576, 1536]


def noise(*shape: int, seed: int = 0, dtype=F32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(mine: torch.Tensor, truth: torch.Tensor) -> None:
    """float32: sums of 1,536 squares and 2**x are good to a few ulp. 16 bits: the norm rounds twice (before and after
    the weight), so two float32 results that nearly agree may end two ulp apart (an ulp is 2**-7 or 2**-10, relative
    to the smallest number of its binade)."""
    assert mine.dtype == truth.dtype
    step = {F32: 2e-6, BF16: 2**-6, F16: 2**-9}[truth.dtype]
    torch.testing.assert_close(mine.float(), truth.float(), atol=1e-6, rtol=step)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype, weight_dtype", FORMATS, ids=str)
def test_norms_agree_with_the_reference(dtype, weight_dtype):
    for width in WIDTHS:
        weight = noise(width, seed=1, dtype=weight_dtype)
        for rows in ROWS:
            x, residual = noise(rows, width, dtype=dtype), noise(rows, width, seed=2, dtype=dtype)
            assert_close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
            mine, truth = residual.clone(), residual.clone()
            assert_close(cpu.add_rms_norm(x, mine, weight, 1e-5), reference.add_rms_norm(x, truth, weight, 1e-5))
            assert same_bits(mine, truth)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_gated_activation_agrees_with_the_reference(dtype):
    for width in WIDTHS:
        for rows in ROWS:
            gate_up = noise(rows, 2 * width, dtype=dtype) * 4
            assert_close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_the_gated_activation_is_calm_at_the_ends():
    gate_up = torch.tensor([[-1e4, -200.0, -88.0, -0.0, 0.0, 88.0, 1e4, 3e38] + [1.0] * 8])
    assert_close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_no_rows_give_no_rows():
    weight = torch.ones(8)
    assert cpu.rms_norm(torch.empty(0, 8), weight, 1e-5).shape == (0, 8)
    assert cpu.add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), weight, 1e-5).shape == (0, 8)
    assert cpu.silu_mul(torch.empty(0, 16)).shape == (0, 8)


def test_a_row_has_the_same_bits_whatever_the_other_rows_and_threads_are():
    x, weight, gate_up = noise(300, 576), noise(576, seed=1), noise(300, 3072, seed=2)
    normed, gated = cpu.rms_norm(x, weight, 1e-5), cpu.silu_mul(gate_up)
    for start, end in ((0, 1), (1, 3), (7, 40), (250, 300)):
        assert same_bits(cpu.rms_norm(x[start:end], weight, 1e-5), normed[start:end])
        assert same_bits(cpu.silu_mul(gate_up[start:end]), gated[start:end])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same_bits(cpu.rms_norm(x, weight, 1e-5), normed)
        assert same_bits(cpu.silu_mul(gate_up), gated)
    finally:
        torch.set_num_threads(before)


def pages_for(rows, heads, kv_heads, head_dim, page_size, dtype, rotary_dim, q_dtype):
    """A step of `rows` rows at odd positions, each to a slot of its own in shuffled pages."""
    codec = resolve_codec("raw", dtype)
    layout = PageLayout([LayerSpec(paged=codec.planes(kv_heads, head_dim, page_size))] * 2, page_size)
    num_pages = layout.pages_for(rows) + 2
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).int()
    place = torch.arange(rows)
    positions = torch.randperm(900, generator=torch.Generator().manual_seed(2))[:rows].int()
    starts = torch.tensor([0, rows], dtype=torch.int32)
    batch = Batch(
        token_ids=place, positions=positions, write_pages=order[place // page_size],
        write_slots=(place % page_size).int(), request_starts=starts, page_tables=order[None], logit_rows=place[:1],
        state_ids=starts[:0], page_size=page_size,
    )  # fmt: skip
    angles = noise(900, rotary_dim // 2, seed=3) * 10
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    qkv = noise(rows, (heads + 2 * kv_heads) * head_dim, seed=4, dtype=q_dtype)
    pool = torch.full((num_pages, layout.page_bytes), 7, dtype=torch.uint8)
    return qkv, cos_sin, pool, codec.bind(layout, 1), batch


@pytest.mark.parametrize("dtype, q_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)], ids=str)
def test_rotation_and_write_agree_with_the_reference_byte_for_byte(dtype, q_dtype):
    for rows, heads, kv_heads, head_dim, page_size, rotary_dim in (
        (1, 9, 3, 64, 16, 64), (17, 9, 3, 64, 16, 64), (200, 4, 1, 80, 4, 80), (33, 2, 2, 32, 1, 16),
    ):  # fmt: skip
        qkv, cos_sin, pool, planes, batch = pages_for(
            rows, heads, kv_heads, head_dim, page_size, dtype, rotary_dim, q_dtype
        )
        mine, mine_pool = qkv.clone(), pool.clone()
        cpu.rope_and_store(mine, cos_sin, mine_pool, planes, batch, heads)
        reference.rope_and_store(qkv, cos_sin, pool, planes, batch, heads)
        # A compiler may fuse a product with the sum after it, which moves the last bit of a float32.
        assert_close(mine, qkv)
        keys_and_values = mine.view(rows, -1, head_dim)[:, heads:].split(kv_heads, dim=1)
        for offset, written in zip((planes.k_offset, planes.v_offset), keys_and_values, strict=True):
            found = plane_view(mine_pool, planes, offset)[batch.write_pages.long(), :, batch.write_slots.long()]
            assert same_bits(found, written.to(dtype))
        # Bytes of no row's slot stay as they were, in both.
        assert torch.equal(mine_pool == 7, pool == 7) or dtype != F32


def test_rotation_at_position_0_changes_nothing_and_keeps_lengths_elsewhere():
    qkv, cos_sin, pool, planes, batch = pages_for(20, 4, 2, 32, 16, F32, 32, F32)
    before = qkv.clone()
    cpu.rope_and_store(qkv, cos_sin, pool, planes, batch, 4)
    torch.testing.assert_close(qkv.view(20, 8, 32).norm(dim=-1), before.view(20, 8, 32).norm(dim=-1))
    assert torch.equal(qkv.view(20, 8, 32)[:, 6:], before.view(20, 8, 32)[:, 6:])
    flat = torch.cat([torch.ones(900, 16), torch.zeros(900, 16)], dim=1)
    qkv = before.clone()
    cpu.rope_and_store(qkv, flat, pool, planes, batch, 4)
    assert torch.equal(qkv, before)


def test_sixteen_bit_numbers_are_rounded_to_nearest_even_as_torch_does():
    odd = torch.tensor([1.0, 1.00390625, 1.01171875, -1.00390625, 65504.0, 65520.0, 1e-8, 6e-8, 3e38, float("inf"),
                        float("nan"), 0.0, -0.0, 1e-40, 0.1, -0.3])  # fmt: skip
    for dtype in (BF16, F16):
        qkv, cos_sin, pool, planes, batch = pages_for(1, 1, 1, 16, 16, dtype, 16, F32)
        qkv[0, 32:] = odd
        cpu.rope_and_store(qkv, cos_sin, pool, planes, batch, 1)
        found = plane_view(pool, planes, planes.v_offset)[batch.write_pages[0], 0, batch.write_slots[0]]
        torch.testing.assert_close(found, odd.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_ops_picks_the_compiled_twins_for_the_cpu():
    x, weight, gate_up = noise(3, 64), noise(64, seed=1), noise(3, 128, seed=2)
    assert same_bits(ops.rms_norm(x, weight, 1e-5), cpu.rms_norm(x, weight, 1e-5))
    assert same_bits(ops.silu_mul(gate_up), cpu.silu_mul(gate_up))
    assert same_bits(ops.add_rms_norm(x, x.clone(), weight, 1e-5), cpu.add_rms_norm(x, x.clone(), weight, 1e-5))
