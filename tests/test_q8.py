"""8-bit weights: the numbers of GGUF's Q8_0, and products with the bits of the decoded weight."""

import shutil

import numpy as np
import oracles
import pytest
import tiny_gguf
import torch
from gguf import GGMLQuantizationType, quants
from helpers import noise, same_bits
from safetensors.torch import load_file, save_file
from test_exactness import answers

from nanokv.core.config import EngineConfig
from nanokv.core.errors import CheckpointError, ConfigError
from nanokv.hub.gguf import convert
from nanokv.hub.home import Q8_FILE
from nanokv.kernels.cpu import amx
from nanokv.kernels.linear import embed, linear, pack_linear, row_invariant
from nanokv.kernels.ops import Ops
from nanokv.kernels.q8 import dequantise, quantise
from nanokv.llm import LLM

needs_tiles = pytest.mark.skipif(not amx.has_tiles(), reason="needs AMX")
SHAPES = [(1, 32), (7, 32), (200, 64), (960, 576), (64, 1536)]
ROWS = [0, 1, 2, 3, 5, 11, 12, 13, 15, 16, 17, 31, 32, 33, 48, 64, 511, 512, 513, 600]


def decoded(weight: torch.Tensor) -> torch.Tensor:
    return dequantise(*quantise(weight))


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """A random Llama in bfloat16 whose widths are multiples of 32."""
    folder = tmp_path_factory.mktemp("wide-llama")
    return oracles.llama(folder, dtype=torch.bfloat16, hidden_size=96, intermediate_size=160, head_dim=32)


def test_a_number_is_off_by_half_a_scale_at_most():
    weight = noise(50, 320) * torch.logspace(-2, 2, 50).unsqueeze(1)
    codes, scales = quantise(weight)
    assert codes.dtype == torch.int8 and scales.shape == (50, 10) and codes.abs().max() == 127
    error = (dequantise(codes, scales) - weight).abs().unflatten(1, (-1, 32)).amax(2)
    assert (error <= scales.float() * 0.57).all()  # the scale itself is rounded by 2**-11, of 127 steps


def test_blocks_of_gguf_come_out_bit_for_bit():
    weight = (noise(64, 256) * torch.logspace(-5, 1, 64).unsqueeze(1)).numpy()
    weight[3, 32:64] = 0
    kind = GGMLQuantizationType.Q8_0
    blocks = quants.quantize(weight, kind)
    codes, scales = quantise(torch.from_numpy(quants.dequantize(blocks, kind)))
    stored = blocks.reshape(64, 8, 34)
    assert np.array_equal(scales.view(torch.int16).numpy(), stored[..., :2].copy().view(np.int16)[..., 0])
    assert np.array_equal(codes.numpy().reshape(64, 8, 32), stored[..., 2:].view(np.int8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_weight_that_is_not_finite_stays_visible(bad):
    weight = noise(4, 64)
    weight[2, 40] = bad
    assert not linear(torch.ones(1, 64), pack_linear(weight, torch.float32, q8=True))[0, 2].isfinite()


def test_tiny_and_zero_weights_decode_to_zero():
    for size in (0, 1e-30):
        packed = pack_linear(noise(16, 32) * size, torch.float32, q8=True)
        assert not packed.unpack().any() and not linear(noise(3, 32), packed).any()


@needs_tiles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_tiles_a_product_has_the_bits_of_the_decoded_weight_in_bfloat16(shape):
    weight, bias = noise(*shape), noise(shape[0], seed=1).bfloat16()
    packed = pack_linear(weight, torch.bfloat16, q8=True)
    plain = pack_linear(decoded(weight).bfloat16(), torch.bfloat16)
    assert (packed.form, plain.form) == ("q8", "tiles")
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows).bfloat16()
        assert same_bits(linear(x, packed), linear(x, plain)), rows
        assert same_bits(linear(x, packed, bias), linear(x, plain, bias)), rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elsewhere_a_product_has_the_bits_of_the_decoded_weight_in_float32(shape, monkeypatch):
    monkeypatch.setattr(amx, "has_tiles", lambda: False)
    weight, bias = noise(*shape), noise(shape[0], seed=1)
    packed, plain = pack_linear(weight, torch.float32, q8=True), pack_linear(decoded(weight), torch.float32)
    narrow = pack_linear(weight, torch.bfloat16, q8=True)
    assert (packed.form, narrow.form, plain.form) == ("q8", "q8", "blocks")
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows)
        expected = linear(x, plain, bias)
        assert same_bits(linear(x, packed, bias), expected), rows
        x = x.bfloat16()
        assert same_bits(linear(x, narrow, bias), linear(x.float(), plain, bias).bfloat16()), rows


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_tiles)], ids=str)
def test_a_row_has_the_same_bits_with_any_other_rows_and_threads(dtype):
    packed, x = pack_linear(noise(1000, 96), dtype, q8=True), noise(1100, 96, seed=1).to(dtype)
    whole, before = linear(x, packed), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for start, end in ((0, 1), (1, 3), (3, 16), (5, 22), (0, 33), (7, 600), (40, 1100)):
                assert same_bits(linear(x[start:end], packed), whole[start:end])
    finally:
        torch.set_num_threads(before)
    assert row_invariant(torch.float32, "cpu", q8=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_table_are_those_of_the_decoded_weight(dtype):
    table, ids = noise(100, 64), torch.tensor([0, 99, 15, 16, 17, 15])
    packed = pack_linear(table, dtype, q8=True)
    assert torch.equal(packed.unpack(), decoded(table))
    assert torch.equal(embed(packed, ids), decoded(table)[ids].to(dtype))
    assert packed.num_bytes == 112 * (64 + 2 * 2)


def test_the_reference_multiplies_the_decoded_weight():
    weight, x = noise(100, 64), noise(5, 64, seed=1)
    packed = Ops("reference").pack_linear(weight, torch.float32, q8=True)
    assert packed.form == "plain" and torch.equal(packed.data, decoded(weight))
    assert torch.allclose(linear(x, packed), linear(x, pack_linear(weight, torch.float32, q8=True)), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_tiles)])
def test_page_size_prefix_hits_and_chunks_change_no_bit(wide_llama, dtype):
    fields = {"dtype": dtype, "weights": "q8"}
    with LLM(wide_llama, num_pages=64, prefix_cache=False, max_requests=1, **fields) as llm:
        assert llm.stats()["row_invariant"]
        layers = llm.engine.model.layers
        forms = {linear.packed.form for layer in layers for linear in (layer.mlp.gate_up, layer.mlp.down)}
        assert forms == {"q8"} and llm.engine.model.head.packed.form == "q8"
        alone = answers(llm)
    for page_size, budget in ((4, 7), (16, 2048)):
        with LLM(wide_llama, page_size=page_size, num_pages=2048 // page_size, max_step_tokens=budget, **fields) as llm:
            assert answers(llm) == alone
            assert answers(llm) == alone  # now with cache hits


def test_widths_that_hold_no_whole_groups_keep_their_form(tmp_path):
    folder = oracles.llama(tmp_path, hidden_size=64, intermediate_size=112)
    with LLM(folder, num_pages=64, dtype="bfloat16", weights="q8") as q8, LLM(folder, dtype="bfloat16") as plain:
        mlp, usual = q8.engine.model.layers[0].mlp, plain.engine.model.layers[0].mlp
        assert mlp.gate_up.packed.form == "q8"
        assert mlp.down.packed.form == usual.down.packed.form
        assert torch.equal(mlp.down.packed.unpack(), usual.down.packed.unpack())


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "qwen3_next"])
def test_every_kind_of_layer_runs_near_the_logits_of_its_dtype(family, tmp_path):
    folder, prompt = oracles.checkpoint(family, tmp_path), oracles.prompt(40)
    with LLM(folder, num_pages=64, weights="q8") as q8, LLM(folder, num_pages=64) as plain:
        found, expected = q8.score(prompt), plain.score(prompt)
        assert not torch.equal(found, expected)
        assert (found - expected).norm() < 0.15 * expected.norm()
        moe = q8.engine.model.layers[-1].mlp
        assert {weight.form for weight in moe.experts.gate_up} == {"q8"}
        assert moe.router.gate.packed.form == "blocks"


def test_q8_is_refused_in_one_line_where_it_cannot_run(tiny_llama):
    from nanokv.codecs import RawCodec
    from nanokv.models.loader import load_model
    from nanokv.models.read import read_folder

    with pytest.raises(ConfigError, match=r"weights='q4': allowed are auto, q8"):
        EngineConfig(weights="q4")
    codec = RawCodec(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"weights='q8': 8-bit weights are for CPUs, and the device is cuda"):
        load_model(tiny_llama, read_folder(tiny_llama), torch.bfloat16, "cuda", codec, 16, weights="q8")


@pytest.fixture(scope="module")
def q8_file(tmp_path_factory):
    """The checkpoint of a GGUF file whose matrices are in blocks Q8_0, and the blocks by name."""
    folder = tmp_path_factory.mktemp("q8-gguf")
    kind = GGMLQuantizationType.Q8_0
    original = tiny_gguf.write(folder / "tiny.gguf", quantise=True, kinds=(kind, kind))
    (folder / "model").mkdir()
    convert(folder / "tiny.gguf", folder / "model", {}, lambda stage, done, total: None)
    return folder / "model", {name: quants.quantize(one, kind) for name, one in original.items() if one.ndim == 2}


def test_blocks_of_a_gguf_file_reach_the_weights_bit_for_bit(q8_file):
    folder, blocks = q8_file
    expected = {
        name: torch.from_numpy(quants.dequantize(one, GGMLQuantizationType.Q8_0)) for name, one in blocks.items()
    }
    with LLM(folder, num_pages=16, dtype="float32", weights="q8") as llm:
        model = llm.engine.model
        for number, layer in enumerate(model.layers):
            at = f"model.layers.{number}.mlp"
            both = torch.cat([expected[f"{at}.{part}_proj.weight"] for part in ("gate", "up")])
            assert torch.equal(layer.mlp.gate_up.packed.unpack(), both)
            assert torch.equal(layer.mlp.down.packed.unpack(), expected[f"{at}.down_proj.weight"])
        assert torch.equal(model.head.packed.unpack(), expected["model.embed_tokens.weight"])


def test_without_q8_the_rounded_numbers_of_a_gguf_file_are_read(q8_file, tmp_path):
    folder, _ = q8_file
    without = shutil.copytree(folder, tmp_path / "without")
    (without / Q8_FILE).unlink()
    with LLM(folder, num_pages=16) as llm, LLM(without, num_pages=16) as other:
        assert torch.equal(llm.score([3, 4, 5]), other.score([3, 4, 5]))


@pytest.mark.parametrize("fault", ["scales are missing", "scales are misshapen", "codes are floats"])
def test_a_damaged_file_of_codes_is_refused_in_one_line(q8_file, tmp_path, fault):
    folder = shutil.copytree(q8_file[0], tmp_path / "model")
    tensors, name = load_file(folder / Q8_FILE), "model.layers.0.mlp.down_proj.weight"
    if fault == "codes are floats":
        tensors[name] = tensors[name].float()
    else:
        scales = tensors.pop(f"{name}_scale")
        if fault == "scales are misshapen":
            tensors[f"{name}_scale"] = scales[:, :-1].contiguous()
    save_file(tensors, folder / Q8_FILE)
    with pytest.raises(CheckpointError, match=r"down_proj.weight': expected codes I8 .* with scales F16") as caught:
        LLM(folder, num_pages=16, weights="q8")
    assert "\n" not in str(caught.value)
