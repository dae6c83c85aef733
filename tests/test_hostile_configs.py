"""Configs from strangers: any value of any field, any file in the place of a JSON file. One line refuses each."""

import json
import os
import time

import pytest
from test_model_config import SMOLLM2, without

from nanokv.core.errors import CheckpointError
from nanokv.hub.catalog import CATALOG
from nanokv.layers import rotary
from nanokv.models.fields import MOST_BYTES, read_json
from nanokv.models.loader import tensors
from nanokv.models.read import read_config, read_folder

SHAPES = {
    "smollm2-135m-instruct": SMOLLM2,
    "qwen3-30b-a3b": CATALOG["qwen3-30b-a3b"].config,
    "deepseek-v3": CATALOG["deepseek-v3"].config,
    "qwen3-next-80b-a3b": CATALOG["qwen3-next-80b-a3b"].config,
}
COUNTS = [
    (name, field)
    for name, config in SHAPES.items()
    for field, value in config.items()
    if isinstance(value, int) and not isinstance(value, bool) and not field.endswith("token_id")
    if field not in ("rope_theta", "max_window_layers")
]


@pytest.mark.parametrize(("name", "field"), COUNTS)
def test_a_count_beyond_every_released_model_is_refused_with_its_field(name, field):
    for value in (2**25, 2**31, 2**63, 10**30, 1e300):
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=f"config.json: {field}=") as error:
            read_config({**SHAPES[name], field: value})
        assert len(str(error.value)) < 200 and time.monotonic() - started < 2


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"])
def test_a_count_at_its_bound_names_tensors_without_overflow(field):
    config = read_config(without(**{field: 1 << 16, "head_dim": 64, "num_key_value_heads": 1}))
    assert len(tensors(config)) == 30 * 9 + 2


@pytest.mark.parametrize("name", SHAPES)
def test_any_value_of_any_field_is_read_or_refused_in_one_line(name):
    for field in SHAPES[name]:
        for value in (
            0,
            -1,
            1.5,
            "1",
            True,
            None,
            [1],
            {},
            {"a": 1},
            [[]],
            1e-320,
            float("nan"),
            "x" * 10**6,
            [7] * 10**5,
        ):
            try:
                read_config({**SHAPES[name], field: value})
            except CheckpointError as error:
                message = str(error)
                assert "\n" not in message and len(message) < 300, message


def test_an_error_never_prints_a_long_value():
    for value in (
        "x" * 10**6,
        list(range(10**5)),
        {f"k{i}": i for i in range(10**5)},
        10**4000,
        [[["x" * 500] * 9] * 9],
    ):
        with pytest.raises(CheckpointError) as error:
            read_config(without(hidden_size=value))
        assert len(str(error.value)) < 200


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "hf_quant_config.json"])
def test_deep_nesting_pipes_folders_devices_and_huge_files_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    path = tmp_path / name

    def refused(complaint):
        with pytest.raises(CheckpointError, match=f"{name}: .*{complaint}"):
            read_json(path)
        path.unlink()

    for content in (DEEP, "[" * 100_000, json.dumps(SMOLLM2)[:-1] + ', "x": ' + DEEP + "}"):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=f"{name}: .*nested too deeply"):
            read_folder(tmp_path)
    path.unlink()
    os.mkfifo(path)
    refused("not a regular file")
    path.symlink_to("/dev/zero")
    refused("not a regular file")
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    refused("larger than 32 MiB")
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "hf_quant_config.json"])
def test_a_pipe_in_a_model_folder_is_not_waited_for(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        read_folder(tmp_path)


def test_naming_the_tensors_of_a_model_fills_no_table_of_its_positions(monkeypatch):
    """16 million positions of 4,096 dimensions: each alone is allowed."""
    monkeypatch.delattr(rotary, "_fill")
    tensors(read_config(without(max_position_embeddings=1 << 24, head_dim=4096, num_hidden_layers=4)))


def test_ids_outside_of_the_vocabulary_are_left_out(tmp_path):
    """A model never says them, and no file needs them to run."""
    (tmp_path / "config.json").write_text(json.dumps(without(eos_token_id=[2, 49152, -1], bos_token_id=49152)))
    for stated, expected in ((-1, (2,)), ([0, 5000000, -1], (2, 0)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
        config = read_folder(tmp_path)
        assert (config.eos_token_ids, config.bos_token_id) == (expected, None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id=\['x'\]"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0), ("logit_scale", 0.0625),
        ("logits_scaling", 8.0), ("embedding_multiplier", 12.0), ("residual_multiplier", 0.22), ("clip_qkv", 8.0),
        ("attention_multiplier", 0.5), ("query_pre_attn_scalar", 256), ("hidden_activation", "gelu_pytorch_tanh"),
        ("use_qk_norm", True), ("qkv_bias", True), ("sliding_window", 4096), ("use_sliding_window", True),
        ("rope_interleaved", True), ("no_rope_layers", [1, 0]), ("attention_chunk_size", 8192),
        ("layer_types", ["sliding_attention"] * 30), ("partial_rotary_factor", 0.5), ("swiglu_limit", 7.0),
        ("attn_output_gate", True), ("index_topk", 2048), ("mamba_ssm_dtype", "bfloat16"), ("hidden_act", "gelu"),
    ],
)  # fmt: skip
def test_a_field_that_would_change_numbers_is_refused(field, value):
    with pytest.raises(CheckpointError, match=f"config.json: {field}=") as error:
        read_config(without(**{field: value}))
    assert len(str(error.value)) < 200


def test_fields_with_neutral_values_are_allowed():
    neutral = without(
        logit_scale=1.0, embedding_multiplier=1, attention_multiplier=0.125, query_pre_attn_scalar=64,
        use_qk_norm=False, qkv_bias=False, clip_qkv=None, hidden_activation="silu", sliding_window=4096,
        use_sliding_window=False,
        max_window_layers=20, no_rope_layers=[1] * 30, attn_output_gate=False, rope_interleaved=False,
    )  # fmt: skip
    assert read_config(neutral) == read_config(SMOLLM2)


def test_mistral_with_a_window_is_refused_and_without_one_is_read():
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert read_config(without(**mistral, sliding_window=None)).num_kv_heads == 3
    for config in (without(**mistral, sliding_window=4096), without(**mistral)):  # the default is 4096
        with pytest.raises(CheckpointError, match="sliding_window.*(not supported|is missing)") as error:
            read_config(config)
        assert len(str(error.value)) < 200


def test_qwen2_ignores_a_window_that_is_not_used():
    """As released: sliding_window and max_window_layers stay in the file."""
    qwen2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 131072}
    config = read_config(without(**qwen2, use_sliding_window=False, max_window_layers=28))
    assert config.qkv_bias and not config.attention_bias and not config.qk_norm
    with pytest.raises(CheckpointError, match="use_sliding_window=True"):
        read_config(without(**qwen2, use_sliding_window=True))
