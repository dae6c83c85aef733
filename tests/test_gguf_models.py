"""Every architecture of GGUF that is read: a checkpoint written as llama.cpp writes it comes back as it was."""

import numpy as np
import oracles
import pytest
import tiny_gguf
import torch

from nanokv import LLM
from nanokv.core.errors import PullError
from nanokv.hub.gguf import convert
from nanokv.hub.gguf_config import read_config
from nanokv.hub.gguf_file import GGUFFile

MODELS = {
    "llama": ("llama", "llama", {}),
    "llama_biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_qkv_biases": ("qwen2", "llama", {}),
    "mistral": ("mistral", "llama", {}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2_yarn": ("qwen2", "qwen2", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32.0, "beta_slow": 1.0}}),
    "qwen3": ("qwen3", "qwen3", {}),
    "qwen3moe": ("qwen3_moe", "qwen3moe", {"mlp_only_layers": []}),
    "deepseek_v2_lite": ("deepseek_v2_lite", "deepseek2", {}),
    "deepseek_v2": ("deepseek_v2", "deepseek2", {}),
    "deepseek_v3": ("deepseek_v3", "deepseek2", {}),
}  # fmt: skip
"""Name -> the family of the checkpoint, the architecture of the file, and fields of the config."""


def converted(name, folder, dtype=torch.bfloat16, **options):
    """The folders of a checkpoint and of the one that its GGUF file becomes."""
    family, arch, fields = MODELS[name]
    source = oracles.checkpoint(family, folder / "source", dtype=dtype, vocab_size=len(tiny_gguf.TOKENS), **fields)
    tiny_gguf.from_checkpoint(folder / "tiny.gguf", source, arch, **options)
    model = folder / "model"
    model.mkdir()
    convert(folder / "tiny.gguf", model, {}, lambda *_: None)
    return source, model


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A checkpoint, and what its GGUF file becomes."""
    return request.param, *converted(request.param, tmp_path_factory.mktemp(request.param))


def test_every_architecture_comes_back_as_the_checkpoint_it_was(pair):
    name, source, model = pair
    ours, theirs = oracles.reference(model), oracles.reference(source)
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys() or name == "mistral"
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(state[key].float(), tensor.float()), key
    tokens = oracles.prompt(40)
    assert torch.equal(oracles.logits(ours, tokens), oracles.logits(theirs, tokens))


def test_every_architecture_runs_and_gives_the_numbers_of_transformers(pair):
    _, source, model = pair
    reference = oracles.reference(source).float()
    tokens = oracles.prompt(40)
    scores = LLM(str(model), dtype="float32", num_pages=32).score(tokens)
    assert torch.allclose(torch.as_tensor(scores), oracles.logits(reference, tokens), atol=2e-4)


def test_a_deepseek_file_of_2024_holds_the_projection_of_keys_and_values_whole(tmp_path):
    (tmp_path / "old").mkdir()
    _, old = converted("deepseek_v2_lite", tmp_path / "old", whole_kv_b=True)
    (tmp_path / "new").mkdir()
    _, new = converted("deepseek_v2_lite", tmp_path / "new")
    assert (old / "model.safetensors").read_bytes() == (new / "model.safetensors").read_bytes()
    assert (old / "config.json").read_bytes() == (new / "config.json").read_bytes()


def test_the_bias_that_chooses_experts_is_not_rounded(tmp_path):
    source, model = converted("deepseek_v3", tmp_path, torch.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    ours, theirs = oracles.reference(model).state_dict()[name], oracles.reference(source).state_dict()[name]
    assert torch.equal(ours.float(), theirs)
    assert not torch.equal(theirs.bfloat16().float(), theirs)


def config_with(tmp_path, name="llama", **options):
    """The config of a tiny file with edited keys."""
    family, arch, fields = MODELS[name]
    source = oracles.checkpoint(family, tmp_path / "source", vocab_size=len(tiny_gguf.TOKENS), **fields)
    tiny_gguf.from_checkpoint(tmp_path / "tiny.gguf", source, arch, **options)
    return read_config(GGUFFile(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("key", "value"), [("rope.scaling.factor", 4.0), ("rope.scale_linear", 4.0), ("rope.scaling.type", "linear")]
)
def test_a_factor_without_a_type_scales_positions_linearly(tmp_path, key, value):
    def edit(writer):
        if key == "rope.scaling.type":
            writer.add_string(f"llama.{key}", value)
            writer.add_float32("llama.rope.scaling.factor", 4.0)
        else:
            writer.add_float32(f"llama.{key}", value)

    assert config_with(tmp_path, edit=edit)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "factor"), [("linear", None), ("linear", 0.0), ("linear", 1.0), ("none", 4.0), ("yarn", 1.0), (None, None)]
)
def test_positions_are_not_scaled_without_a_factor_or_by_the_type_none(tmp_path, kind, factor):
    def edit(writer):
        if kind is not None:
            writer.add_string("llama.rope.scaling.type", kind)
        if factor is not None:
            writer.add_float32("llama.rope.scaling.factor", factor)

    assert config_with(tmp_path, edit=edit)["rope_scaling"] is None


def test_absent_keys_mean_what_llama_cpp_takes_them_to_mean(tmp_path):
    tiny_gguf.write(
        tmp_path / "tiny.gguf",
        without=("llama.rope.freq_base", "llama.rope.dimension_count", "llama.attention.head_count_kv"),
        leave_out=("blk.0.attn_k.weight",),
    )
    config = read_config(GGUFFile(tmp_path / "tiny.gguf"))
    assert (config["rope_theta"], config["num_key_value_heads"], config["head_dim"]) == (10000.0, 4, 16)

    def edit(writer):
        for key in ("rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"):
            writer.kv_data[0].pop(f"qwen2.{key}")

    (tmp_path / "yarn").mkdir()
    scaling = config_with(tmp_path / "yarn", "qwen2_yarn", edit=edit)["rope_scaling"]
    assert (scaling["original_max_position_embeddings"], scaling["beta_fast"]) == (512, 32.0)

    def old(writer):
        for key in ("group_count", "group_used_count", "weights_scale"):
            writer.kv_data[0].pop(f"deepseek2.expert_{key}")

    (tmp_path / "v3").mkdir()
    config = config_with(tmp_path / "v3", "deepseek_v3", edit=old)
    assert (config["n_group"], config["topk_group"], config["routed_scaling_factor"]) == (1, 1, 1.0)


def test_a_count_for_each_layer_may_be_a_list_of_equal_ones(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, edit=tiny_gguf.replaced("llama.attention.head_count_kv", [2, 2]))
    assert read_config(GGUFFile(path))["num_key_value_heads"] == 2
    tiny_gguf.write(path, edit=tiny_gguf.replaced("llama.attention.head_count_kv", [2, 1]))
    with pytest.raises(PullError, match=r"head_count_kv=a list of 2: expected an integer above 0, the same in all"):
        read_config(GGUFFile(path))


def llama3_divisors(factor: float, theta: float, dim: int) -> np.ndarray:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": theta}  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=dim, rope_parameters=scaling), "cpu")
    return (theta ** -(np.arange(0, dim, 2) / dim) / scaled.numpy()).astype(np.float32)


def test_llama_3s_rope_scaling_is_recognised_from_its_divisors(tmp_path):
    path = tmp_path / "tiny.gguf"
    theta = tiny_gguf.replaced("llama.rope.freq_base", 500000.0)
    tiny_gguf.write(path, edit=theta, more={"rope_freqs.weight": llama3_divisors(32.0, 500000.0, tiny_gguf.DIM)})
    assert read_config(GGUFFile(path))["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    tiny_gguf.write(path, more={"rope_freqs.weight": np.linspace(1, 32, 8, dtype=np.float32)})
    with pytest.raises(PullError, match=r"rope_freqs.weight does not follow Llama 3's scaling"):
        read_config(GGUFFile(path))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("llama.rope.scaling.type", "longrope", "rope scaling 'longrope' is not supported"),
        ("llama.rope.scaling.attn_factor", 1.5, "attn_factor is not supported, but for 1"),
        ("llama.expert_count", 8, "a mixture of experts is not supported in the architecture llama"),
        ("llama.rope.dimension_count", 8, "differs from the head size 16"),
        ("llama.attention.value_length", 8, "differs from the head size 16"),
        ("llama.attention.key_length", 15, "dimension_count differs from the head size 15"),
        ("llama.attention.head_count", 0, "head_count=0: expected an integer above 0"),
        ("llama.context_length", 2**32 - 1, "context_length=4294967295: expected an integer from 1"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "epsilon=nan: expected a number"),
        ("llama.block_count", 2**32 - 1, "block_count=4294967295: expected an integer from 1"),
        ("llama.block_count", 65_536, "block_count=65536, but tensor blk.65535.attn_norm.weight is"),
    ],
)  # fmt: skip
def test_an_unsupported_feature_or_impossible_count_is_refused_by_its_key(tmp_path, key, value, complaint):
    tiny_gguf.write(tmp_path / "tiny.gguf", edit=tiny_gguf.replaced(key, value))
    with pytest.raises(PullError) as caught:
        read_config(GGUFFile(tmp_path / "tiny.gguf"))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value", "complaint"),
    [
        ("deepseek_v3", "deepseek2.expert_gating_func", 3, "expert_gating_func=3 is not supported"),
        ("deepseek_v3", "deepseek2.expert_count", 2**31, "expert_count=2147483648: expected"),
        ("deepseek_v3", "deepseek2.attention.temperature_scale", 0.1, "temperature_scale is not supported"),
        ("deepseek_v2", "deepseek2.expert_weights_norm", True, "not supported with expert_gating_func=1"),
        ("qwen3moe", "qwen3moe.expert_count", 7, "of the wrong shape: blk.0.ffn_gate_inp.weight"),
    ],
)
def test_experts_that_nanokv_cannot_compute_are_refused(tmp_path, name, key, value, complaint):
    with pytest.raises(PullError, match=complaint):
        converted(name, tmp_path, edit=tiny_gguf.replaced(key, value))
