"""FP8 and NVFP4 checkpoints load as the same numbers stored plainly do; what cannot be decoded is one line."""

import json
import re
import shutil
from math import ceil

import oracles
import pytest
import torch
from harness import Rig, load
from helpers import same_bits
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from nanokv.core.errors import CheckpointError
from nanokv.models import quantized
from nanokv.models.checkpoint import Checkpoint
from nanokv.models.identity import _weights
from nanokv.models.read import read_folder

pytestmark = pytest.mark.usefixtures("threads")
FP8 = torch.float8_e4m3fn
MATRIX = re.compile(r"model\.layers\..*(_proj|_proj_with_mqa)\.weight")
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
BLOCK = (24, 40)
"""Divides no size of the tiny models."""


# Writers of each layout: a matrix -> (tensors to store by suffix of "weight", the numbers that they mean in float32)


def fp8(matrix, grid, suffix, scale_dtype=torch.float32):
    """FP8 with a scale for each block of `grid` (rows, columns); written number by number, as a specification."""
    rows, columns = matrix.shape
    high, wide = (min(size, block) for size, block in zip(matrix.shape, grid, strict=True))
    scales = torch.empty(ceil(rows / high), ceil(columns / wide))
    codes, meant = torch.empty(matrix.shape, dtype=FP8), torch.empty(matrix.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            scale = (matrix[block].abs().max().float() / 448).to(scale_dtype).float()
            scales[i, j] = scale
            codes[block] = (matrix[block].float() / scale).clamp(-448, 448).to(FP8)
            meant[block] = codes[block].float() * scale
    return {"": codes, suffix: scales.to(scale_dtype)}, meant


def per_row(matrix):
    scales = matrix.float().abs().amax(1, keepdim=True) / 448
    codes = (matrix.float() / scales).clamp(-448, 448).to(FP8)
    return {"": codes, "_scale": scales}, codes.float() * scales


def per_tensor(matrix):
    stored, meant = fp8(matrix, tuple(matrix.shape), "_scale")
    return {"": stored[""], "_scale": stored["_scale"].reshape(())}, meant


def nvfp4(matrix, divide):
    """Two codes to a byte, the even column in the low half; a scale for 16 numbers, and one for the matrix."""
    whole = (matrix.abs().max().float() / (6 * 448)).reshape(1)
    second = 1 / whole if divide else whole
    groups = matrix.float().reshape(matrix.shape[0], -1, 16)
    scales = (groups.abs().amax(2) / 6 / whole).clamp(2**-9, 448).to(FP8)
    real = scales.float() / second if divide else scales.float() * second
    table = torch.tensor(E2M1)
    codes = (groups / real.unsqueeze(2)).unsqueeze(3).sub(table).abs().argmin(3)
    meant = (table[codes] * real.unsqueeze(2)).reshape(matrix.shape)
    codes = codes.reshape(matrix.shape)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    names = ("_packed", "_scale", "_global_scale") if divide else ("", "_scale", "_scale_2")
    return dict(zip(names, (packed, scales, second if divide else second.reshape(())), strict=True)), meant


LAYOUTS = {
    "deepseek": (
        lambda matrix: fp8(matrix, BLOCK, "_scale_inv"),
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
    ),
    "qwen": (  # scales in bfloat16
        lambda matrix: fp8(matrix, (128, 128), "_scale_inv", torch.bfloat16),
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "powers of two": (
        lambda matrix: fp8(matrix, BLOCK, "_scale_inv", torch.float8_e8m0fnu),
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": list(BLOCK)},
    ),
    "compressed-tensors rows": (
        per_row,
        {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
         "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}}},
    ),
    "modelopt tensor": (per_tensor, {"quant_algo": "FP8", "kv_cache_scheme": "FP8", "producer": {"name": "modelopt"}}),
    "modelopt nvfp4": (
        lambda matrix: nvfp4(matrix, divide=False), {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ),
    "compressed-tensors nvfp4": (
        lambda matrix: nvfp4(matrix, divide=True),
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
         "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 4, "group_size": 16}}}},
    ),
}  # fmt: skip


def quantise(plain, root, layout, every=1):
    """Folders (quantised, plain): each `every`-th matrix of a checkpoint in a layout, and the numbers that it means."""
    write, described = LAYOUTS[layout]
    tensors = load_file(plain / "model.safetensors")
    stored, meant = dict(tensors), dict(tensors)
    matrices = [name for name in sorted(tensors) if MATRIX.fullmatch(name)]
    for name in matrices[::every]:
        parts, numbers = write(tensors[name])
        del stored[name]
        stored.update({name + suffix: tensor.contiguous() for suffix, tensor in parts.items()})
        meant[name] = numbers
    stored["model.layers.0.self_attn.q_proj.input_scale"] = torch.tensor(2.0)
    stored["model.layers.1.self_attn.k_proj.k_scale"] = torch.tensor(3.0)
    config = json.loads((plain / "config.json").read_text())
    for name, content, more in (("quantised", stored, {"quantization_config": described}), ("plain", meant, {})):
        (root / name).mkdir(parents=True)
        save_file(content, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(config | more))
    return root / "quantised", root / "plain"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Tiny bfloat16 models with a tensor for each expert, as released ones have them."""
    root = tmp_path_factory.mktemp("originals")
    return {
        family: oracles.checkpoint(family, root / family, dtype=torch.bfloat16)
        for family in ("llama", "qwen3", "qwen3_moe", "deepseek_v3")
    }


@pytest.fixture(scope="module")
def blocks(originals, tmp_path_factory):
    """The llama in FP8 blocks, never written to by the tests."""
    return quantise(originals["llama"], tmp_path_factory.mktemp("blocks"), "deepseek")


def logits(folder, dtype=torch.float32):
    return Rig(load(folder, dtype=dtype, kernels="reference")).run(oracles.prompt(20), 20)


def matrices(folder, dtype):
    """Every tensor that the loader would hand to a builder, in `dtype`."""
    config = read_folder(folder)
    checkpoint = Checkpoint(folder, config, dtype)
    shapes = {name: tensor.shape for name, tensor in checkpoint._tensors.items()}
    return {name: checkpoint.read(name, shape).to(dtype) for name, shape in shapes.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_matrices_are_those_of_the_plain_checkpoint_to_the_bit(originals, tmp_path, layout):
    for family, original in originals.items():
        stored, meant = quantise(original, tmp_path / family, layout)
        assert equal(matrices(stored, torch.bfloat16), matrices(meant, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_they_are_decoded_to_the_dtype_of_the_model(originals, tmp_path, dtype):
    for layout in ("deepseek", "compressed-tensors nvfp4"):
        stored, meant = quantise(originals["llama"], tmp_path / layout, layout)
        assert equal(matrices(stored, dtype), matrices(meant, dtype))


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("layout", ["deepseek", "modelopt nvfp4"])
def test_a_quantised_model_gives_the_logits_of_the_plain_one(originals, tmp_path, family, layout):
    stored, meant = quantise(originals[family], tmp_path, layout)
    assert torch.equal(logits(stored), logits(meant))
    assert not torch.equal(logits(stored), logits(originals[family]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_without_scales_are_read_as_they_are(originals, tmp_path, layout):
    stored, meant = quantise(originals["llama"], tmp_path, layout, every=3)
    assert equal(matrices(stored, torch.bfloat16), matrices(meant, torch.bfloat16))


def test_formats_may_be_mixed_in_one_checkpoint(originals, tmp_path):
    stored, meant = quantise(originals["llama"], tmp_path / "a", "modelopt tensor", every=2)
    wanted, other = load_file(meant / "model.safetensors"), load_file(stored / "model.safetensors")
    for name in [name for name in wanted if MATRIX.fullmatch(name) and f"{name}_scale" not in other]:
        parts, wanted[name] = nvfp4(other.pop(name), divide=False)
        other.update({name + suffix: tensor for suffix, tensor in parts.items()})
    save_file(other, stored / "model.safetensors")
    save_file(wanted, meant / "model.safetensors")
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    (stored / "config.json").write_text(json.dumps(config))
    assert equal(matrices(stored, torch.float32), matrices(meant, torch.float32))


class Largest(TorchDispatchMode):
    """Records the most numbers in any float32 or int32 tensor that an operation makes."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.int32):
            self.found = max(self.found, result.numel())
        return result


@pytest.mark.parametrize("layout", ["deepseek", "compressed-tensors rows", "modelopt nvfp4"])
def test_decoding_holds_a_chunk_beside_its_result(originals, tmp_path, layout, monkeypatch):
    stored, meant = quantise(originals["llama"], tmp_path, layout)
    wanted = matrices(meant, torch.bfloat16)
    monkeypatch.setattr(quantized, "CHUNK", 700)  # less than any matrix, and no whole number of rows
    with Largest() as largest:
        got = matrices(stored, torch.bfloat16)
    assert equal(got, wanted) and 0 < largest.found <= 2 * 700  # scales are spread over whole blocks


def change(folder, tmp_path, edit=lambda tensors: None, **described):
    """A copy of a quantised folder whose tensors or description a test changes."""
    copy = shutil.copytree(folder, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"].update(described)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def refused(folder, *words):
    with pytest.raises(CheckpointError) as error:
        load(folder, dtype=torch.bfloat16)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message
    return message


NAME = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "no scale": (lambda t: t.pop(f"{NAME}_scale_inv"), "F8_E4M3 without weight_scale"),
    "few scales": (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(2, 2)}), "has scales F32 [2, 2]; expected"),
    "two scales": (lambda t: t.update({f"{NAME}_scale": torch.ones(6, 2)}), "has more scales than its format"),
    "integer scales": (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(6, 2, dtype=torch.int32)}), "I32 [6, 2]"),
    "nan": (lambda t: t[f"{NAME}_scale_inv"].fill_(float("nan")), "not a finite number"),
    "inf": (lambda t: t[f"{NAME}_scale_inv"][0].fill_(float("inf")), "not a finite number"),
    "no codes": (lambda t: t.pop(NAME), f"missing: {NAME}"),
    "plain codes": (lambda t: t.update({NAME: torch.ones(128, 64)}), f"unexpected: {NAME}_scale_inv"),
    "vector": (lambda t: t.update({NAME: torch.ones(64).to(FP8)}), "only matrices are decoded"),
    "empty": (lambda t: t.update({NAME: torch.ones(0, 64).to(FP8)}), "only matrices are decoded"),
    "e5m2": (lambda t: t.update({NAME: t[NAME].float().to(torch.float8_e5m2)}), "F8_E5M2"),
    "smoothed": (lambda t: t.update({"model.layers.1.mlp.up_proj.pre_quant_scale": torch.ones(64)}), "unexpected"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_missing_misshapen_and_unreal_scales_are_named(blocks, tmp_path, fault):
    edit, words = FAULTS[fault]
    refused(change(blocks[0], tmp_path, edit), "model.layers.1.mlp.up_proj", words)


def test_faults_of_every_layer_are_one_line(blocks, tmp_path):
    def edit(tensors):
        for layer in range(2):
            del tensors[f"model.layers.{layer}.self_attn.q_proj.weight_scale_inv"]

    refused(change(blocks[0], tmp_path, edit), "model.layers.{0-1}.self_attn.q_proj.weight is F8_E4M3 without")


def test_packed_codes_need_both_scales_and_groups_of_16(originals, tmp_path):
    folder = quantise(originals["llama"], tmp_path / "a", "modelopt nvfp4")[0]
    refused(change(folder, tmp_path, lambda t: t.pop(f"{NAME}_scale_2")), NAME, "U8 without weight_scale_2")
    refused(change(folder, tmp_path, lambda t: t.pop(f"{NAME}_scale")), NAME, "U8 without weight_scale")
    refused(change(folder, tmp_path, group_size=32), "mlp.up_proj.weight is not NVFP4")
    wide = quantise(originals["llama"], tmp_path / "b", "compressed-tensors nvfp4")[0]
    refused(change(wide, tmp_path, lambda t: t[f"{NAME}_global_scale"].zero_()), NAME, "not a finite number")
    refused(change(wide, tmp_path, lambda t: t.update({NAME: torch.ones(128, 64)})), NAME, "is also stored plainly")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "mxfp4", "x" * 5000])
def test_other_quantisations_are_refused_in_one_short_line(blocks, tmp_path, method):
    folder = change(blocks[0], tmp_path, quant_method=method)
    message = refused(folder, "config.json: weights in", "not decoded here; use the plain, FP8 or NVFP4 checkpoint")
    assert len(message) < 200
    load(folder, load="dummy")  # needs no weights


def test_codes_without_a_description_are_refused(blocks, tmp_path):
    folder = change(blocks[0], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "not of a supported dtype", "is F8_E4M3")


def test_a_quantised_checkpoint_and_its_plain_one_have_their_own_identities(blocks):
    assert _weights(blocks[0]) != _weights(blocks[1])
