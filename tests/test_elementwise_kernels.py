"""Norms, gates, rotation and the write into pages: compiled twins against the torch ones."""

from __future__ import annotations

import pytest
import torch
from harness import step_of
from helpers import noise, same_bits

from nanokv.codecs import resolve_codec
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.kernels import cpu, reference
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import HeadNorms
from nanokv.kernels.reference.attention import plane_view

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SLOW = pytest.mark.slow
FORMATS = [
    *((F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32)),
    *(pytest.param(F16, weights, marks=SLOW) for weights in (F16, F32)),  # further compilations of what bfloat16 shows
]
"""Of activations and weights."""
ROWS = [1, 2, 3, 7, 64, 500]
WIDTHS = [8, 33, 576, 1536]


def assert_close(mine: torch.Tensor, truth: torch.Tensor) -> None:
    """float32: sums of 1,536 squares and 2**x are good to a few ulp. 16 bits: the norm rounds twice (before and after
    the weight), so two float32 results that nearly agree may end two ulp apart (an ulp is 2**-7 or 2**-10, relative
    to the smallest number of its binade)."""
    assert mine.dtype == truth.dtype
    step = {F32: 2e-6, BF16: 2**-6, F16: 2**-9}[truth.dtype]
    torch.testing.assert_close(mine.float(), truth.float(), atol=1e-6, rtol=step)


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


@pytest.mark.parametrize("dtype, weight_dtype", FORMATS, ids=str)
def test_the_gated_norm_agrees_with_the_reference(dtype, weight_dtype):
    for rows, heads, dim in ((1, 1, 16), (3, 4, 128), (70, 2, 33)):
        weight = noise(dim, seed=1, dtype=weight_dtype)
        x, z = noise(rows, heads * dim, dtype=dtype), (4 * noise(rows, heads * dim + 5, seed=2, dtype=dtype))[:, 5:]
        assert_close(cpu.gated_rms_norm(x, z, weight, 1e-6), reference.gated_rms_norm(x, z, weight, 1e-6))


def test_transformers_gives_the_same_gated_norm():
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    for dtype in (F32, BF16):
        norm = Qwen3_5RMSNormGated(32, eps=1e-6)
        norm.weight.data = noise(32, dtype=dtype)
        x, z = noise(9, 96, seed=1, dtype=dtype), noise(9, 96, seed=2, dtype=dtype)
        truth = norm(x.view(-1, 32), z.view(-1, 32)).view(9, 96).detach()
        assert same_bits(reference.gated_rms_norm(x, z, norm.weight.detach(), 1e-6), truth)


def test_a_gated_norm_refuses_a_gate_that_does_not_fit():
    x, weight = noise(3, 64), torch.ones(32)
    for z in (x[:, 1:], x[:2], x.bfloat16(), torch.cat([x, x], dim=1)[:, ::2]):
        with pytest.raises(ValueError, match="does not fit"):
            cpu.gated_rms_norm(x, z, weight, 1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=SLOW)], ids=str)
def test_the_gated_activation_agrees_with_the_reference(dtype):
    for width in WIDTHS:
        for rows in ROWS:
            gate_up = noise(rows, 2 * width, dtype=dtype) * 4
            assert_close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_the_gated_activation_agrees_at_extreme_inputs():
    gate_up = torch.tensor([[-1e4, -200.0, -88.0, -0.0, 0.0, 88.0, 1e4, 3e38] + [1.0] * 8])
    assert_close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=SLOW)], ids=str)
def test_the_output_gate_agrees_with_the_reference(dtype):
    for width in WIDTHS:
        for rows in ROWS:
            x, wide = noise(rows, width, dtype=dtype), noise(rows, width + 40, seed=1, dtype=dtype) * 4
            gate = wide[:, 40:]  # columns of a wider product
            assert_close(cpu.sigmoid_mul(x, gate), reference.sigmoid_mul(x, gate))
    ends = torch.tensor([[-1e4, -200.0, -88.0, -0.0, 0.0, 88.0, 1e4, 3e38]])
    assert_close(cpu.sigmoid_mul(torch.ones(1, 8), ends), torch.sigmoid(ends))


def test_an_output_gate_that_does_not_fit_is_refused():
    x = noise(3, 16)
    for gate in (noise(3, 15), noise(2, 16), noise(3, 32)[:, ::2], noise(3, 16).bfloat16()):
        with pytest.raises(ValueError, match="does not fit"):
            cpu.sigmoid_mul(x, gate)


def test_a_weight_wider_than_the_row_is_multiplied_before_the_row_is_rounded():
    x, weight = noise(40, 128, dtype=BF16), 1 + noise(128, seed=1) / 10
    once = (reference.rms_norm(x.float(), weight, 1e-6)).bfloat16()
    assert same_bits(reference.rms_norm(x, weight, 1e-6), once)
    assert (cpu.rms_norm(x, weight, 1e-6) != once).float().mean() < 0.01  # float32 sums in another order
    assert (cpu.rms_norm(x, weight.bfloat16(), 1e-6) != once).float().mean() > 0.1


def test_no_rows_give_no_rows():
    weight = torch.ones(8)
    assert cpu.rms_norm(torch.empty(0, 8), weight, 1e-5).shape == (0, 8)
    assert cpu.add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), weight, 1e-5).shape == (0, 8)
    assert cpu.silu_mul(torch.empty(0, 16)).shape == (0, 8)
    assert cpu.sigmoid_mul(torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)
    assert cpu.gated_rms_norm(torch.empty(0, 16), torch.empty(0, 16), weight, 1e-5).shape == (0, 16)


def test_a_row_has_the_same_bits_with_any_other_rows_and_threads():
    x, weight, gate_up = noise(300, 576), noise(576, seed=1), noise(300, 3072, seed=2)
    normed, gated, opened = cpu.rms_norm(x, weight, 1e-5), cpu.silu_mul(gate_up), cpu.sigmoid_mul(x, gate_up[:, :576])
    both = cpu.gated_rms_norm(x, gate_up[:, :576], weight[:64], 1e-5)
    for start, end in ((0, 1), (1, 3), (7, 40), (250, 300)):
        assert same_bits(cpu.rms_norm(x[start:end], weight, 1e-5), normed[start:end])
        assert same_bits(cpu.silu_mul(gate_up[start:end]), gated[start:end])
        assert same_bits(cpu.sigmoid_mul(x[start:end], gate_up[start:end, :576]), opened[start:end])
        assert same_bits(cpu.gated_rms_norm(x[start:end], gate_up[start:end, :576], weight[:64], 1e-5), both[start:end])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same_bits(cpu.rms_norm(x, weight, 1e-5), normed)
        assert same_bits(cpu.silu_mul(gate_up), gated)
        assert same_bits(cpu.gated_rms_norm(x, gate_up[:, :576], weight[:64], 1e-5), both)
    finally:
        torch.set_num_threads(before)


def pages_for(rows, heads, kv_heads, head_dim, page_size, dtype, rotary_dim, q_dtype):
    """A step of `rows` rows at odd positions, each to a slot of its own in shuffled pages."""
    codec = resolve_codec("raw", dtype)
    layout = PageLayout([LayerSpec(paged=codec.planes(kv_heads, head_dim, page_size))] * 2, page_size)
    num_pages = layout.pages_for(rows) + 2
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).int()
    place = torch.arange(rows)
    positions = torch.randperm(900, generator=torch.Generator().manual_seed(2))[:rows]
    batch = step_of({0: positions.tolist()}, order[None], page_size, order[place // page_size], place % page_size)
    angles = noise(900, rotary_dim // 2, seed=3) * 10
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    qkv = noise(rows, (heads + 2 * kv_heads) * head_dim, seed=4, dtype=q_dtype)
    pool = torch.full((num_pages, layout.page_bytes), 7, dtype=torch.uint8)
    return qkv, cos_sin, pool, codec.bind(layout, 1), batch


@pytest.mark.parametrize(
    "dtype, q_dtype",
    [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), pytest.param(F16, F16, marks=SLOW)],
    ids=str,
)
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
            where = batch.write_pages.long(), slice(None), batch.write_slots.long()
            found = plane_view(mine_pool, planes, offset, head_dim)[where]
            assert same_bits(found, written.to(dtype))
        # Bytes of no row's slot stay as they were, in both.
        assert torch.equal(mine_pool == 7, pool == 7) or dtype != F32


@pytest.mark.parametrize("weight_dtype, q_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16)], ids=str)
def test_heads_are_normed_before_they_are_rotated(weight_dtype, q_dtype):
    for rows, heads, kv_heads, head_dim, rotary_dim in ((1, 4, 2, 128, 128), (50, 6, 2, 32, 8), (17, 3, 1, 33, 32)):
        qkv, cos_sin, pool, planes, batch = pages_for(rows, heads, kv_heads, head_dim, 16, F32, rotary_dim, q_dtype)
        norms = HeadNorms(noise(head_dim, seed=5).to(weight_dtype), noise(head_dim, seed=6).to(weight_dtype), 1e-6)
        by_hand, by_hand_pool = qkv.clone().view(rows, -1, head_dim), pool.clone()
        q, k, _ = by_hand.split((heads, kv_heads, kv_heads), dim=1)
        q[:], k[:] = reference.rms_norm(q, norms.q, norms.eps), reference.rms_norm(k, norms.k, norms.eps)
        reference.rope_and_store(by_hand.flatten(1), cos_sin, by_hand_pool, planes, batch, heads)
        for twin in (reference, cpu):
            mine, mine_pool = qkv.clone(), pool.clone()
            twin.rope_and_store(mine, cos_sin, mine_pool, planes, batch, heads, norms)
            assert_close(mine, by_hand.flatten(1))
            where = batch.write_pages.long(), slice(None), batch.write_slots.long()
            for offset in (planes.k_offset, planes.v_offset):
                pages = [plane_view(own, planes, offset, head_dim)[where] for own in (mine_pool, by_hand_pool)]
                torch.testing.assert_close(*pages, atol=1e-6, rtol=2e-6 if q_dtype == F32 else 2**-6)


def test_qkv_may_be_the_first_columns_of_a_wider_product():
    qkv, cos_sin, pool, planes, batch = pages_for(40, 4, 2, 32, 16, F32, 16, F32)
    wide, norms = torch.cat([qkv, noise(40, 128, seed=9)], dim=1), HeadNorms(noise(32), noise(32, seed=1), 1e-6)
    for twin in (cpu, reference):
        alone, alone_pool, own, own_pool = qkv.clone(), pool.clone(), wide.clone(), pool.clone()
        twin.rope_and_store(alone, cos_sin, alone_pool, planes, batch, 4, norms)
        twin.rope_and_store(own[:, :256], cos_sin, own_pool, planes, batch, 4, norms)
        assert same_bits(own[:, :256], alone) and same_bits(own[:, 256:], wide[:, 256:])
        assert torch.equal(own_pool, alone_pool)
    with pytest.raises(ValueError, match="does not fit"):
        cpu.rope_and_store(wide, cos_sin, pool, planes, batch, 4)


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
        found = plane_view(pool, planes, planes.v_offset, 16)[batch.write_pages[0], 0, batch.write_slots[0]]
        torch.testing.assert_close(found, odd.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_ops_picks_the_compiled_twins_for_the_cpu():
    x, weight, gate_up = noise(3, 64), noise(64, seed=1), noise(3, 128, seed=2)
    assert same_bits(AUTO.rms_norm(x, weight, 1e-5), cpu.rms_norm(x, weight, 1e-5))
    assert same_bits(AUTO.silu_mul(gate_up), cpu.silu_mul(gate_up))
    assert same_bits(AUTO.sigmoid_mul(x, x), cpu.sigmoid_mul(x, x))
    assert same_bits(AUTO.gated_rms_norm(x, x, weight, 1e-5), cpu.gated_rms_norm(x, x, weight, 1e-5))
    assert same_bits(AUTO.add_rms_norm(x, x.clone(), weight, 1e-5), cpu.add_rms_norm(x, x.clone(), weight, 1e-5))


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_a_cast_rounds_as_torch_does(source, target):
    x = noise(5, 70, dtype=source)[:, 3:40] * 1000
    assert same_bits(AUTO.cast(x, target), x.to(target))
