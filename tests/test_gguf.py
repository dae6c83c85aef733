"""GGUF files become the checkpoints they were made from."""

import json

import numpy as np
import pytest
import tiny_gguf
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file

from nanokv.core.errors import PullError
from nanokv.hub.catalog import CATALOG
from nanokv.hub.gguf import convert, read_config, undo_permutation
from nanokv.hub.gguf_file import GGUFFile


def silent(stage, done, total):
    pass


def converted(folder, **options):
    path = folder / "tiny.gguf"
    original = tiny_gguf.write(path, **options)
    model = folder / "model"
    model.mkdir()
    convert(path, model, {"temperature": 0.5}, silent)
    return original, model


def refused(folder, **options) -> str:
    with pytest.raises(PullError) as caught:
        converted(folder, **options)
    assert "\n" not in str(caught.value)
    assert not list((folder / "model").iterdir())
    return str(caught.value)


def test_every_tensor_comes_back_as_it_was(tmp_path):
    original, model = converted(tmp_path)
    loaded = load_file(model / "model.safetensors")
    assert set(loaded) == set(original)
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), torch.from_numpy(original[name])), name


def test_quantised_tensors_are_widened_and_rounded_to_bf16(tmp_path):
    original, model = converted(tmp_path, quantise=True)
    loaded = load_file(model / "model.safetensors")
    for name, tensor in loaded.items():
        expected = original[name]
        if expected.ndim == 2:  # rows are quantised one by one, so their order does not matter
            kind = GGMLQuantizationType.Q4_1 if "proj" in name else GGMLQuantizationType.Q8_0
            expected = quants.dequantize(quants.quantize(expected, kind), kind)
        assert torch.equal(tensor, torch.from_numpy(expected).to(torch.bfloat16)), name


@pytest.mark.parametrize("heads", [1, 3, 9])
def test_the_permutation_is_undone(heads):
    weight = np.arange(heads * 8 * 5, dtype=np.float32).reshape(heads * 8, 5)
    assert np.array_equal(undo_permutation(tiny_gguf.permute(weight, heads), heads), weight)


def test_rotating_neighbours_before_equals_rotating_halves_after():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 8))
    angles = 3.0 * 10000.0 ** (-np.arange(4) / 4)
    cos, sin = np.cos(angles), np.sin(angles)

    def halves(x):
        return np.concatenate([x[:4] * cos - x[4:] * sin, x[4:] * cos + x[:4] * sin])

    def neighbours(x):
        return np.stack([x[::2] * cos - x[1::2] * sin, x[1::2] * cos + x[::2] * sin], axis=1).ravel()

    back = halves(undo_permutation(q[:, None], 1)[:, 0]) @ undo_permutation(k[:, None], 1)[:, 0]
    assert np.isclose(neighbours(q) @ k, back)


def test_the_folder_is_complete(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    _, model = converted(tmp_path)
    assert AutoConfig.from_pretrained(model).num_key_value_heads == tiny_gguf.KV_HEADS
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer("hello world é").input_ids) == "hello world é"
    assert tokenizer.tokenize("hello world") == ["hello", "Ġworld"]
    generation = json.loads((model / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.5}
    assert (model / "chat_template.jinja").read_text() == tiny_gguf.TEMPLATE


def test_the_catalog_says_of_smollm2_what_its_file_says(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config == CATALOG["smollm2-135m-instruct"].config
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"], generation["eos_token_id"]) == (0.2, 0.9, 2)


def test_another_architecture_is_refused_and_the_supported_ones_are_named(tmp_path):
    assert "'qwen2' is not supported; supported are llama" in refused(tmp_path, arch="qwen2")


def test_another_pre_tokenizer_is_refused(tmp_path):
    assert "pre-tokenizer 'tekken' is not supported; 'llama' and" in refused(tmp_path, pre="tekken")


def test_missing_tensors_are_named(tmp_path):
    assert "tensors missing: blk.1.ffn_up.weight" in refused(tmp_path, leave_out=("blk.1.ffn_up.weight",))


def test_unknown_tensors_are_named(tmp_path):
    more = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    assert "tensors unknown: blk.0.attn_q.bias" in refused(tmp_path, more=more)


def test_misshapen_tensors_are_named(tmp_path):
    more = {"output_norm.weight": np.zeros(63, np.float32)}
    message = refused(tmp_path, leave_out=("output_norm.weight",), more=more)
    assert "of the wrong shape: output_norm.weight [63]" in message


def test_a_file_truncated_anywhere_is_refused_in_one_line(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path)
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 11, 24, 100, 500, 2000, 5000, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(PullError, match=r"cut\.gguf: (truncated or damaged|not a GGUF)") as caught:
            convert(cut, tmp_path, {}, silent)
        assert "\n" not in str(caught.value)


def test_a_file_of_noise_is_refused_in_one_line(tmp_path):
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + np.random.default_rng(0).bytes(4000))
    with pytest.raises(PullError, match="truncated or damaged"):
        GGUFFile(path)


class Metadata:
    """A GGUF file with the metadata and tensors that a test sets."""

    path = "some.gguf"

    def __init__(self, **tensors):
        self.fields = {
            "general.architecture": "llama",
            "llama.block_count": 16,
            "llama.context_length": 131072,
            "llama.embedding_length": 2048,
            "llama.feed_forward_length": 8192,
            "llama.attention.head_count": 32,
            "llama.attention.head_count_kv": 8,
            "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
            "llama.rope.freq_base": 500000.0,
            "tokenizer.ggml.eos_token_id": 128009,
        }
        self.tensors = {"token_embd.weight": np.zeros((128256, 1), np.float32), **tensors}
        self.tensor_names = set(self.tensors)

    def get(self, key, default=None):
        return self.fields.get(key, default)

    require = get

    def shape(self, name):
        return self.tensors[name].shape

    def tensor(self, name):
        return self.tensors[name]


def test_llama_3s_rope_scaling_is_recognised_from_its_divisors():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    reference = LlamaConfig(head_dim=64, rope_parameters={**scaling, "rope_theta": 500000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, "cpu")
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    file = Metadata(**{"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)})
    config = read_config(file)
    assert config["rope_scaling"] == scaling
    assert (config["rope_theta"], config["rms_norm_eps"], config["head_dim"]) == (500000.0, 1e-05, 64)
    file.tensors["rope_freqs.weight"] = np.linspace(1, 32, 32, dtype=np.float32)
    with pytest.raises(PullError, match=r"rope_freqs.weight does not follow Llama 3's scaling"):
        read_config(file)


def test_linear_rope_scaling_and_several_end_tokens_are_kept():
    file = Metadata()
    file.fields |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    file.fields |= {"tokenizer.ggml.eot_token_id": 128008}
    config = read_config(file)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["eos_token_id"] == [128009, 128008]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("llama.rope.scaling.type", "yarn", "rope scaling 'yarn' is not supported"),
        ("llama.expert_count", 8, "mixture of experts"),
        ("llama.rope.dimension_count", 32, "differs from the head size 64"),
    ],
)
def test_an_unsupported_feature_is_refused(field, value, complaint):
    file = Metadata()
    file.fields[field] = value
    with pytest.raises(PullError, match=complaint):
        read_config(file)
