"""Linear layers: right for every shape and format, and in float32 a row's bits depend on that row alone."""

import subprocess
import sys

import pytest
import torch
from helpers import noise, same_bits

from nanokv.kernels import forms
from nanokv.kernels import linear as kernels
from nanokv.kernels.linear import (
    activation_dtype,
    embed,
    head_linear,
    linear,
    pack_head_linear,
    pack_linear,
    row_invariant,
)
from nanokv.kernels.ops import Ops
from nanokv.kernels.reference import linear as reference

FORMATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 3), (16, 64), (17, 63), (100, 77), (1000, 33), (960, 576), (576, 1536)]
ROWS = [*range(1, 20), 31, 63, 64, 65, 130]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_format_agrees_with_sums_in_float64(shape, dtype):
    weight = noise(*shape).to(dtype)
    packed = pack_linear(weight, torch.float32)
    assert (packed.shape, packed.weight_dtype, packed.activation_dtype) == (shape, dtype, torch.float32)
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows)
        y = linear(x, packed)
        assert y.is_contiguous() and y.dtype == torch.float32
        torch.testing.assert_close(y, reference.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_no_rows_give_no_rows():
    assert linear(torch.empty(0, 64), pack_linear(noise(20, 64), torch.float32)).shape == (0, 20)


def test_a_bias_is_added():
    weight, x, bias = noise(20, 64), noise(3, 64, seed=1), noise(20, seed=2)
    y = linear(x, pack_linear(weight, torch.float32), bias)
    torch.testing.assert_close(y, reference.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_rows_may_be_a_view_of_wider_rows_or_of_columns():
    weight, wide = noise(48, 64), noise(7, 200, seed=1)
    packed = pack_linear(weight, torch.float32)
    assert torch.equal(linear(wide[:, 100:164], packed), linear(wide[:, 100:164].contiguous(), packed))
    columns = wide.T[:64, :5].contiguous().T
    assert torch.equal(linear(columns, packed), linear(columns.contiguous(), packed))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(100, 77), (960, 576), (576, 1536)], ids=str)
def test_a_row_has_the_same_bits_for_any_number_of_rows(shape, dtype):
    packed = pack_linear(noise(*shape).to(dtype), torch.float32)
    x = noise(513, shape[1], seed=1)
    whole = bits(linear(x, packed))
    for rows in [*range(1, 41), 63, 64, 65, 128, 511, 512]:
        assert torch.equal(bits(linear(x[:rows], packed)), whole[:rows]), rows
    alone = torch.cat([bits(linear(x[row : row + 1], packed)) for row in range(100)])
    assert torch.equal(alone, whole[:100])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_row_has_the_same_bits_at_any_place_with_any_batch_mates(dtype):
    packed = pack_linear(noise(960, 576).to(dtype), torch.float32)
    x = noise(97, 576, seed=1)
    whole = bits(linear(x, packed))
    order = torch.randperm(97, generator=torch.Generator().manual_seed(2))
    assert torch.equal(bits(linear(x[order], packed)), whole[order])
    mates = noise(97, 576, seed=3) * 1e6
    mates[40] = x[40]
    mates[0] = float("nan")
    assert torch.equal(bits(linear(mates, packed))[40], whole[40])


def test_a_row_has_the_same_bits_with_any_number_of_threads():
    packed, x, threads = pack_linear(noise(960, 576), torch.float32), noise(70, 576, seed=1), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(bits(linear(x, packed)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_engine_can_say_that_rows_are_invariant(dtype):
    if activation_dtype("cpu", dtype) == torch.float32:
        assert row_invariant(dtype, "cpu") is True
    else:
        assert row_invariant(dtype, "cpu") in (True, False)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(100, 77), (512, 64)], ids=str)
def test_a_packed_weight_is_also_an_embedding_table_and_unpacks_to_itself(shape, dtype):
    table = noise(*shape).to(dtype)
    packed = pack_linear(table, torch.float32)
    ids = torch.tensor([0, shape[0] - 1, 15, 16, 17, 15])
    assert torch.equal(embed(packed, ids), reference.embed(table, ids, torch.float32))
    assert embed(packed, ids).is_contiguous()
    assert torch.equal(packed.unpack(), table)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_reference_choice_multiplies_plain_weights_on_a_cpu(dtype):
    weight, x, ops = noise(100, 77).to(dtype), noise(5, 77, seed=1), Ops("reference")
    packed = ops.pack_linear(weight, torch.float32)
    assert packed.form == "plain" and torch.equal(packed.unpack(), weight)
    assert torch.allclose(linear(x, packed), reference.linear(x, weight), atol=1e-4)
    assert torch.equal(embed(packed, torch.tensor([3])), reference.embed(weight, torch.tensor([3]), torch.float32))
    heads = ops.pack_head_linear(noise(4, 16, 8, seed=2).to(dtype), torch.float32)
    assert heads.form == "plain" and head_linear(noise(5, 4, 8, seed=3), heads).shape == (5, 4, 16)
    assert ops.row_invariant(dtype, "cpu", (64,)) in (True, False)


def test_16_bit_weights_stay_16_bit():
    assert pack_linear(noise(64, 64).bfloat16(), torch.float32).num_bytes == 64 * 64 * 2


def test_packing_copies_so_that_a_checkpoint_can_be_dropped():
    weight = noise(64, 64)
    packed = pack_linear(weight, torch.float32)
    before = packed.unpack().clone()
    weight.zero_()
    assert torch.equal(packed.unpack(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_dtype_without_a_packed_form_falls_back_to_torch(dtype, monkeypatch):
    monkeypatch.setattr(forms, "multiplies_bfloat16", lambda: False)
    weight, x = noise(20, 64).to(dtype), noise(3, 64, seed=1).to(dtype)
    packed = pack_linear(weight, dtype)
    assert packed.form == "plain"
    torch.testing.assert_close(linear(x, packed), reference.linear(x, weight), rtol=2e-2, atol=5e-2)
    assert torch.equal(embed(packed, torch.tensor([19, 0])), weight[[19, 0]])


def test_x_of_the_wrong_width_or_dtype_is_refused():
    packed = pack_linear(noise(20, 64), torch.float32)
    for x in (noise(3, 63), noise(3, 65), noise(3, 64).double()):
        with pytest.raises(TypeError, match=r"expected float32 \[rows, 64\]"):
            linear(x, packed)


def test_activations_take_the_dtype_that_the_device_multiplies(monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    assert activation_dtype("cpu", torch.bfloat16) == torch.bfloat16
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    assert activation_dtype("cpu", torch.bfloat16) == torch.float32
    assert activation_dtype("cpu", torch.float16) == torch.float32
    assert activation_dtype("cpu", torch.float32) == torch.float32
    assert activation_dtype("cuda:1", torch.bfloat16) == torch.bfloat16
    assert activation_dtype(torch.device("cuda"), torch.float16) == torch.float16


HEADS = [(1, 1, 1), (3, 24, 17), (16, 128, 512), (16, 512, 128), (128, 16, 32)]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_each_head_has_a_product_of_its_own(shape, dtype):
    weight = noise(*shape, dtype=dtype)
    packed = pack_head_linear(weight, torch.float32)
    assert (packed.shape, packed.form) == (shape, "blocks")
    for rows in (0, 1, 2, 7, 64, 65):
        x = noise(rows, shape[0], shape[2] + 9, seed=rows)[..., 4 : 4 + shape[2]]
        y = head_linear(x, packed)
        assert y.is_contiguous()
        torch.testing.assert_close(y, reference.head_linear(x, weight), rtol=1e-4, atol=1e-4)


def test_a_row_of_a_product_by_heads_has_the_same_bits_with_any_other_rows():
    packed, x = pack_head_linear(noise(16, 40, 96, dtype=torch.bfloat16), torch.float32), noise(130, 16, 96, seed=1)
    whole, before = head_linear(x, packed), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for start, end in ((0, 1), (1, 3), (3, 9), (9, 41), (40, 130)):
                assert same_bits(head_linear(x[start:end], packed), whole[start:end])
    finally:
        torch.set_num_threads(before)


def test_activations_of_sixteen_bits_are_summed_in_float32_and_rounded_once():
    weight, x = noise(4, 24, 100, dtype=torch.bfloat16), noise(9, 4, 100, seed=1, dtype=torch.bfloat16)
    y = head_linear(x, pack_head_linear(weight, torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert same_bits(y, head_linear(x.float(), pack_head_linear(weight, torch.float32)).bfloat16())


def test_a_dtype_without_a_packed_head_form_falls_back_to_torch():
    weight, x = noise(4, 24, 100).double(), noise(9, 4, 100, seed=1).double()
    packed = pack_head_linear(weight, torch.float64)
    assert packed.form == "plain" and head_linear(x, packed).is_contiguous()
    torch.testing.assert_close(head_linear(x, packed), reference.head_linear(x, weight))


def test_an_x_that_does_not_fit_the_heads_is_refused():
    packed = pack_head_linear(noise(4, 24, 100), torch.float32)
    for x in (noise(2, 4, 99), noise(2, 3, 100), noise(2, 4, 100).double()):
        with pytest.raises(TypeError, match=r"expected (float32 \[rows, 4, 100\]|torch.float32)"):
            head_linear(x, packed)


@pytest.mark.skipif(not forms.multiplies_bfloat16(), reason="needs a CPU with bfloat16 instructions")
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536)], ids=str)
def test_bfloat16_throughout_agrees_with_sums_in_float64(shape):
    weight = noise(*shape).bfloat16()
    packed = pack_linear(weight, torch.bfloat16)
    assert packed.form in ("tiles", "pairs")
    for rows in (1, 2, 3, 17, 64):
        x = noise(rows, shape[1], seed=rows).bfloat16()
        torch.testing.assert_close(linear(x, packed), reference.linear(x, weight), rtol=2e-2, atol=0.3)


def test_numba_is_imported_only_when_a_weight_is_packed():
    code = "import sys, nanokv.kernels.linear; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


refused = forms.Tiles().refusal(noise(16, 32).bfloat16(), torch.bfloat16)
needs_tiles = pytest.mark.skipif(refused is not None, reason=f"tiles: {refused}")


@pytest.mark.skipif(not forms.multiplies_bfloat16(), reason="needs a CPU with bfloat16 instructions")
@pytest.mark.parametrize("shape", [(7, 34), (200, 576), (64, 1536)], ids=str)
def test_a_product_of_pairs_is_that_of_float64_rounded_once_for_any_number_of_rows(shape, monkeypatch):
    monkeypatch.setattr(forms, "_no_tiles", lambda: "the CPU has no AMX")
    weight, bias, x = noise(*shape).bfloat16(), noise(shape[0], seed=9).bfloat16(), noise(90, shape[1]).bfloat16()
    packed, ids = pack_linear(weight, torch.bfloat16), torch.tensor([0, shape[0] - 1, 3])
    assert (
        packed.form == "pairs" and torch.equal(packed.unpack(), weight) and torch.equal(embed(packed, ids), weight[ids])
    )
    whole, expected = linear(x, packed, bias), x.double() @ weight.double().T + bias.double()
    assert torch.allclose(whole.double(), expected, rtol=2**-8, atol=1e-3)  # half a unit, and sums
    for start, end in ((0, 0), (0, 1), (1, 3), (3, 16), (5, 22), (7, 90)):
        assert same_bits(linear(x[start:end], packed, bias), whole[start:end])
    assert same_bits(linear(torch.cat((x, x), 1)[:, : shape[1]], packed, bias), whole)


@needs_tiles
@pytest.mark.parametrize("shape", [(7, 32), (200, 576), (960, 576), (64, 1536)], ids=str)
def test_a_product_on_tiles_is_that_of_float64_rounded_once(shape):
    weight, bias = noise(*shape).bfloat16(), noise(shape[0], seed=9).bfloat16()
    packed = pack_linear(weight, torch.bfloat16)
    assert packed.form == "tiles" and torch.equal(packed.unpack(), weight)
    ids = torch.tensor([0, shape[0] - 1, 3])
    assert torch.equal(embed(packed, ids), weight[ids]) and packed.num_bytes < 1.1 * weight.nbytes + 2048 * 32
    for rows in (0, 1, 15, 16, 17, 33, 64):
        x = noise(rows, shape[1], seed=rows).bfloat16()
        expected = x.double() @ weight.double().T + bias.double()
        assert torch.allclose(
            linear(x, packed, bias).double(), expected, rtol=2**-8, atol=1e-3
        )  # half a unit, and sums
        assert same_bits(linear(x, packed), linear(x, packed, torch.zeros_like(bias)))


@needs_tiles
def test_a_row_of_a_product_on_tiles_has_the_same_bits_with_any_other_rows_and_threads():
    packed, x = pack_linear(noise(1000, 96).bfloat16(), torch.bfloat16), noise(1100, 96, seed=1).bfloat16()
    whole, before = linear(x, packed), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for start, end in ((0, 1), (1, 3), (3, 16), (5, 22), (0, 33), (7, 600), (40, 1100)):
                assert same_bits(linear(x[start:end], packed), whole[start:end])
    finally:
        torch.set_num_threads(before)
    assert row_invariant(torch.bfloat16, "cpu")


@needs_tiles
def test_where_linux_refuses_tiles_the_next_form_is_taken(monkeypatch):
    from nanokv.kernels.cpu import amx

    monkeypatch.setattr(amx, "has_tiles", lambda: False)
    assert pack_linear(noise(64, 64).bfloat16(), torch.bfloat16).form == "pairs"
    monkeypatch.undo()
    assert pack_linear(noise(64, 34).bfloat16(), torch.bfloat16).form == "pairs"
    assert pack_linear(noise(64, 33).bfloat16(), torch.bfloat16).form == "plain"
