"""Rotary positions in config.json against transformers, and the context that a config reaches."""

import oracles
import pytest
import torch
import transformers
from harness import Rig, load
from test_model_config import SMOLLM2, without

from nanokv.core.errors import CheckpointError
from nanokv.layers import rotary
from nanokv.layers.rotary import RopeConfig, cos_sin_table, extend, first_positions, frequencies
from nanokv.models.read import read_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALINGS = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    "llama3 without original": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, truncated": {**YARN, "truncate": True},
    "yarn without original": {"rope_type": "yarn", "factor": 4.0},
    "yarn without a factor": {"rope_type": "yarn", "original_max_position_embeddings": 2048, "factor": None},
    "yarn with attention_factor": {**YARN, "attention_factor": 1.25},
    "yarn with betas": {**YARN, "beta_fast": 24, "beta_slow": 2},
    "yarn of Kimi-K2": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn with mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn of a short original": {**YARN, "original_max_position_embeddings": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def test_every_field_of_a_scaling_changes_the_angles_as_in_transformers(kind):
    got = read_config(without(rope_scaling=SCALINGS[kind])).rope
    config = transformers.LlamaConfig(**without(rope_scaling=dict(SCALINGS[kind])))
    reference = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    torch.testing.assert_close(frequencies(got), reference.inv_freq, rtol=1e-6, atol=0)
    assert got.amplitude == pytest.approx(reference.attention_scaling)


def test_the_original_context_beside_the_scaling_counts_as_in_transformers():
    rope = read_config(without(rope_scaling={"type": "yarn", "factor": 2.0}, original_max_position_embeddings=512)).rope
    assert rope.original_max_positions == 512


@pytest.mark.parametrize(
    ("max_positions", "scaling", "expected"),
    [
        (40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen3
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen2.5
        (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),  # DeepSeek-V3
        (8192, {"type": "yarn", "factor": 4.0}, 32768),
        (131072, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192}, 131072),  # Llama 3.2
        (16384, {"type": "linear", "factor": 4.0}, 16384),
        (1_010_000, None, 1_010_000),  # Qwen2.5-1M
    ],
)  # fmt: skip
def test_a_model_reaches_the_context_that_yarn_scales_to(max_positions, scaling, expected):
    config = read_config(without(max_position_embeddings=max_positions, rope_scaling=scaling))
    assert config.max_positions == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {**YARN, "stretch": 2}}, "rope_scaling: stretch=2: has no meaning for rope_type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}}, "rope_scaling: beta_fast=32"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling: factor=4.0: has no meaning for rope_type='default'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "rope_scaling: type='linear'"),
        ({"rope_scaling": {"rope_theta": 5.0}}, "rope_scaling: rope_theta=5.0: .* rope_theta=100000"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 9}, "original_max_position_embeddings=2048"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling: factor=0.5"),
        ({"rope_scaling": {**YARN, "factor": 1e9}}, "rope_scaling: factor=1000000000.0: scales to"),
        ({"rope_scaling": {**YARN, "truncate": 0}}, "rope_scaling: truncate=0: expected true or false"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "rope_scaling: beta_slow=2"),
        ({"rope_scaling": {**YARN, "beta_fast": 1e300}}, "rope_scaling: beta_fast=1e.300"),
        ({"rope_scaling": {**YARN, "beta_slow": 1e-320}}, "rope_scaling: beta_slow=1e-320"),
        ({"rope_theta": 1}, "rope_theta=1: expected more than 1"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type=.'yarn'.: supported are"),
    ],
)
def test_a_field_of_a_scaling_that_is_not_read_is_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        read_config(without(**changes))


def test_fields_that_change_nothing_for_text_are_allowed():
    harmless = {"rope_type": "default", "type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True,
                "factor": 1.0, "attention_factor": None, "original_max_position_embeddings": 64}  # fmt: skip
    assert read_config(without(rope_scaling=harmless)) == read_config(SMOLLM2)


def test_a_table_that_grows_has_the_rows_of_a_whole_one(monkeypatch):
    monkeypatch.setattr(rotary, "_ROWS_AT_ONCE", 7)
    rope = RopeConfig(16, 1e4, amplitude=1.5)
    whole, table = cos_sin_table(rope, 100), cos_sin_table(rope, 10)
    shared = table
    for needed, rows in ((5, 10), (11, 20), (64, 64), (90, 100)):
        extend(table, rope, needed, 100)
        assert len(table) == rows and torch.equal(shared, whole[:rows])


def test_a_prompt_beyond_the_first_rows_of_the_table_gives_the_same_logits(tmp_path, monkeypatch):
    folder, prompt = oracles.llama(tmp_path), oracles.prompt(100)
    expected = Rig(load(folder)).run(prompt, 37)
    monkeypatch.setattr(rotary, "FIRST_POSITIONS", 8)
    decoder = load(folder)
    assert len(decoder.cos_sin) == 8
    assert torch.equal(Rig(decoder).run(prompt, 37), expected)
    assert 100 <= len(decoder.cos_sin) < decoder.config.max_positions


def test_a_long_context_costs_no_memory_before_it_is_used():
    assert first_positions(10_000_000, torch.device("cpu")) == 1 << 17
    assert first_positions(10_000_000, torch.device("cuda")) == 10_000_000  # CUDA graphs record where the table lies
    assert first_positions(512, torch.device("cpu")) == 512
    assert cos_sin_table(RopeConfig(128, 1e6), 1 << 24, "meta").shape == (1 << 24, 128)
