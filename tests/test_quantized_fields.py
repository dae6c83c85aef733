"""quantization_config of each writer, as released configs have it."""

import pytest

from nanokv.core.errors import CheckpointError
from nanokv.models.fields import Fields
from nanokv.models.quantized_fields import Quantization, quantization

WEIGHTS4 = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
WEIGHTS8 = {"weights": {"num_bits": 8, "type": "float", "dynamic": False}, "targets": ["Linear"]}
CASES = {
    "DeepSeek-V3": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        Quantization(method="fp8", block=(128, 128)),
    ),
    "Qwen3-30B-A3B-FP8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "gate"]},
        Quantization(method="fp8", block=(128, 128)),
    ),
    "Qwen3-32B-FP8-Static-PerTensor": (
        {"quant_algo": "FP8", "ignore": ["lm_head"], "config_groups": {"group_0": WEIGHTS8}, "kv_cache_scheme": "FP8"},
        Quantization(method="fp8"),
    ),
    "Qwen3.5-122B-A10B-NVFP4": (
        {"quant_algo": "NVFP4", "quant_method": "modelopt", "ignore": ["lm_head"], "config_groups": {"g": WEIGHTS4}},
        Quantization(method="nvfp4", group_size=16),
    ),
    "Qwen3.6-27B-NVFP4": (
        {"quant_algo": "MIXED_PRECISION", "quant_method": "modelopt", "ignore": ["mtp*"]},
        Quantization(method="mixed_precision"),
    ),
    "hf_quant_config.json": (
        {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]},
        Quantization(method="nvfp4", group_size=16),
    ),
    "compressed-tensors fp8": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": WEIGHTS8}},
        Quantization(method="fp8"),
    ),
    "compressed-tensors nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"g": WEIGHTS4}},
        Quantization(method="nvfp4", group_size=16),
    ),
    "Kimi-K2.5": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*self_attn.*"]},
        Quantization(method="pack-quantized"),
    ),
    "a GPTQ file with a scale for each row": (
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False},
        Quantization(method="gptq"),
    ),
    "gpt-oss": ({"quant_method": "mxfp4"}, Quantization(method="mxfp4")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_quantisations_of_all_writers_become_one_vocabulary(name):
    data, expected = CASES[name]
    assert quantization(Fields(data, name)) == expected


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"bits": 4}, "quant_method"),
        ({"quant_method": ["fp8"]}, "quant_method"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "config_groups": {"group_0": 5}}, "group_0"),
        ({"quant_method": "fp8", "group_size": "16"}, "group_size"),
    ],
)
def test_a_malformed_quantisation_names_its_field(data, word):
    with pytest.raises(CheckpointError, match=word):
        quantization(Fields(data, "config.json: quantization_config"))
    assert quantization(Fields({}, "config.json")) is None
