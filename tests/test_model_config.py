"""config.json in the layouts of transformers 4 and 5, and the error messages for files that cannot be run."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch
import transformers

import nanokv
from nanokv.codecs import RawCodec
from nanokv.core.errors import CheckpointError
from nanokv.hub.catalog import CATALOG
from nanokv.layers.rotary import RopeConfig
from nanokv.models import FAMILIES
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import layer_specs
from nanokv.models.loader import tensors
from nanokv.models.read import read_config, read_folder

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def without(*names: str, **changes) -> dict:
    return {name: value for name, value in {**SMOLLM2, **changes}.items() if name not in names}


def test_a_hub_file_of_transformers_4_is_read():
    config = read_config(SMOLLM2)
    assert config == ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        layer_types=("full_attention",) * 30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        qk_norm=False,
        norm_offset=0.0,
        norm_eps=1e-5,
        rope=RopeConfig(64, 100000.0),
        softmax_scale=0.125,
        max_positions=8192,
        tie_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        mla=None,
        moe=None,
        delta=None,
        num_extra_layers=0,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="bfloat16",
    )


def test_a_file_of_transformers_5_says_the_same(tmp_path):
    known = {name: value for name, value in SMOLLM2.items() if name not in ("rope_scaling", "model_type")}
    transformers.LlamaConfig(**known).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "dtype" in written, "transformers still writes the layout under test"
    assert read_folder(tmp_path) == read_config(SMOLLM2)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_llama3_scaling_is_read_from_old_and_new_keys(kind):
    scaling = {kind if name == "rope_type" else name: value for name, value in LLAMA3_SCALING.items()}
    expected = RopeConfig(64, 500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert read_config(without(rope_scaling=scaling, rope_theta=500000.0)).rope == expected
    new = without("rope_scaling", "rope_theta", rope_parameters={**scaling, "rope_theta": 500000.0})
    assert read_config(new).rope == expected
    assert read_config(new | {"rope_scaling": scaling}).rope == expected
    with pytest.raises(CheckpointError, match="rope_scaling.*rope_parameters beside it says otherwise"):
        read_config(new | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})


def test_a_missing_field_of_an_old_file_has_its_old_default():
    config = read_config(without("num_key_value_heads", "rope_theta", "torch_dtype", "tie_word_embeddings"))
    assert config.num_kv_heads == 9 and config.rope.theta == 10000.0
    assert config.dtype is None and config.tie_embeddings is False


def test_eos_ids_of_both_files_are_merged(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    assert read_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert read_folder(tmp_path).eos_token_ids == (2, 0)
    assert read_config(without(eos_token_id=[7, 8])).eos_token_ids == (7, 8)
    assert read_config(without("eos_token_id", "bos_token_id")).eos_token_ids == ()


def test_the_specs_of_the_layers_need_no_weights():
    specs = layer_specs(read_config(SMOLLM2), RawCodec(torch.bfloat16), 16)
    assert len(specs) == 30 and sum(spec.bytes_per_token for spec in specs) == 30 * 2 * 3 * 64 * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["model_type='gpt2'", "size --help"]),
        ({"model_type": None}, ["model_type=None", "size --help"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers=True"]),
        ({"vocab_size": -5}, ["vocab_size=-5"]),
        ({"vocab_size": "49152"}, ["vocab_size='49152'"]),
        ({"hidden_size": 575}, ["hidden_size=575", "num_attention_heads=9"]),
        ({"hidden_size": 9 * 7}, ["head_dim", "7 dims would turn"]),
        ({"head_dim": 64.0}, ["head_dim=64.0"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads=2", "num_attention_heads=9"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps=0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings", "missing"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'", "true or false"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"eos_token_id": [2, "x"]}, ["eos_token_id=[2, 'x']"]),
        ({"bos_token_id": "<s>"}, ["bos_token_id='<s>'"]),
        ({"torch_dtype": "float64"}, ["torch_dtype='float64'", "bfloat16"]),
        ({"quantization_config": {"quant_method": 8}}, ["quantization_config: quant_method=8"]),
        ({"rope_theta": 0}, ["rope_theta=0"]),
        ({"rope_scaling": "llama3"}, ["rope_scaling", "JSON object"]),
        ({"rope_scaling": {"type": "longrope"}}, ["rope_scaling", "'longrope'", "llama3"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling: factor", "missing"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling: factor", "missing"]),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, ["low_freq_factor", "high_freq_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_field_with_an_invalid_value_is_named(changes, words):
    with pytest.raises(CheckpointError) as error:
        read_config(without(**changes))
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize(
    "name",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "vocab_size"],
)
def test_a_field_that_is_missing_is_named_with_its_file(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(without(name)))
    with pytest.raises(CheckpointError, match=rf"config\.json: {name}.*missing"):
        read_folder(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: not a folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_folder(tmp_path)
    for content in ("{", "[]", "\ufffe"):
        (tmp_path / "config.json").write_text(content, encoding="utf-16")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected a JSON object"):
        read_folder(tmp_path)


def test_the_oracles_read_back(tmp_path):
    config = read_folder(oracles.llama(tmp_path, head_dim=24, num_key_value_heads=1))
    assert (config.head_dim, config.num_kv_heads, config.hidden_size, config.dtype) == (24, 1, 64, "float32")


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_every_shape_of_the_catalog_is_read(name):
    config = read_config(CATALOG[name].config)
    assert len(layer_specs(config, RawCodec(torch.bfloat16), 16)) == config.num_layers


# Parameters of the text models as published or computed from the released files.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.1-70b": 70_553_706_496,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen3.5-0.8b": 752_393_024,
    "qwen3.5-4b": 4_205_751_296,
    "qwen3.5-35b-a3b": 34_660_610_688,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_builder_asks_for_every_parameter_of_the_released_model(name):
    config = read_config(CATALOG[name].config)
    assert sum(math.prod(shape) for shape in tensors(config).values()) == PARAMETERS[name]


def test_only_the_module_of_a_family_names_it():
    """hub/ is left out: its files name architectures of GGUF files and models of the catalog."""
    root = Path(nanokv.__file__).parent
    for path in set(root.rglob("*.py")) - set((root / "hub").rglob("*.py")) - {root / "models/__init__.py"}:
        module = ".".join(("nanokv", *path.relative_to(root).with_suffix("").parts))
        others = {name for name, (_, own) in FAMILIES.items() if own != module}
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not others & constants, path


def test_naming_the_tensors_imports_no_compiler():
    """Torch's meta functions may import torch._dynamo, and with it triton: over a second at every start."""
    names = ["qwen3.5-0.8b", "deepseek-v2-lite", "qwen3-0.6b"]
    code = f"""
import sys
from nanokv.hub.catalog import CATALOG
from nanokv.models.loader import tensors
from nanokv.models.read import read_config
for name in {names}:
    tensors(read_config(CATALOG[name].config))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
