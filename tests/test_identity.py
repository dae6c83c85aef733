"""The identity of a model: whatever changes the bytes of a page changes it, and nothing else does."""

import json
import shutil
from dataclasses import fields

import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanokv.codecs import codec_of
from nanokv.core.config import EngineConfig
from nanokv.core.spec import PageLayout
from nanokv.models.decoder import layer_specs
from nanokv.models.identity import model_identity
from nanokv.models.read import read_folder


def identity(folder, dtype="float32", version=1, **settings):
    model, config, kind = read_folder(folder), EngineConfig(**settings), getattr(torch, dtype)
    specs = layer_specs(model, codec_of(config, kind, model.attention_layers), config.page_size)
    return model_identity(folder, model, config, dtype, PageLayout(specs, config.page_size), version)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Never written to by the tests."""
    return oracles.llama(tmp_path_factory.mktemp("identity"), dtype=torch.bfloat16)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder, for the test to change."""
    return shutil.copytree(folder, tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_it_is_a_sha256_and_does_not_depend_on_the_place_of_the_folder(folder, copy):
    assert len(bytes.fromhex(identity(folder))) == 32
    assert identity(folder) == identity(folder) == identity(copy)


CODED, DUMMY = {"codec": "tq4"}, {"load": "dummy"}
COUNTS = [
    ({}, {"dtype": "bfloat16"}),
    ({}, {"page_size": 32}),
    ({}, {"version": 2}),
    ({}, {"codec": "fp8"}),
    ({}, DUMMY),
    (CODED, {"codec": "tq3"}),
    (CODED, {"codec": "tq4/fp8"}),
    (CODED, {"native_layers": "first1"}),
    (CODED, {"prefill": "fast"}),
    (DUMMY, {"seed": 1}),
    ({}, {"kernels": "reference"}),
    ({}, {"weights": "q8"}),
]
"""Settings, and a change of them that changes the bytes of pages."""
IGNORED = [
    {"event_log": "events.jsonl"}, {"max_requests": 2}, {"max_step_tokens": 64}, {"max_model_len": 99},
    {"num_pages": 8}, {"num_states": 8}, {"state_interval": 32}, {"kv_memory": "1MiB"}, {"gpu_memory_fraction": 0.5},
    {"prefix_cache": False}, {"overlap": False}, {"graphs": False}, {"schedule": "longest-prefix"},
    {"debug_checks": True}, {"device": "cpu"}, {"seed": 1}, {"prefill": "fast"}, {"threads": 1},
]  # fmt: skip
"""Settings that change no byte; a seed or a kind of prefill does not where weights are read and pages are raw."""


@pytest.mark.parametrize(("settings", "change"), COUNTS, ids=str)
def test_a_change_of_the_bytes_of_pages_changes_the_identity(folder, settings, change):
    assert identity(folder, **settings) != identity(folder, **{**settings, **change})


@pytest.mark.parametrize("change", IGNORED, ids=str)
def test_a_change_that_only_the_engine_sees_does_not_change_the_identity(folder, change):
    assert identity(folder, **change) == identity(folder)


def test_every_field_of_the_engine_config_is_known_to_count_or_not():
    known = {name for change in (*(change for _, change in COUNTS), *IGNORED) for name in change}
    assert {field.name for field in fields(EngineConfig)} - known == {"center_keys"}, "measured: see models/identity.py"


@pytest.mark.parametrize("change", [{"rope_theta": 5e4}, {"rms_norm_eps": 1e-6}, {"eos_token_id": 3}], ids=str)
def test_another_config_of_the_same_weights_is_another_model(folder, copy, change):
    if "rope_theta" in change:
        change = {"rope_parameters": {"rope_type": "default", **change}}
    edit(copy / "config.json", **change)
    assert identity(copy) != identity(folder)


def test_files_that_no_tensor_follows_from_do_not_count(folder, copy):
    edit(copy / "config.json", initializer_range=0.5)
    (copy / "README.md").write_text("another text")
    assert identity(copy) == identity(folder)


def test_other_weights_of_the_same_shape_are_another_model(folder, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert (copy / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    assert identity(copy) != identity(folder)


def test_a_renamed_truncated_or_missing_file_of_weights_is_seen(folder, copy):
    path, seen = copy / "model.safetensors", {identity(folder)}
    path.write_bytes(path.read_bytes()[:-1])
    seen.add(identity(copy))
    path.rename(copy / "other.safetensors")
    seen.add(identity(copy))
    (copy / "other.safetensors").unlink()
    seen.add(identity(copy))
    assert len(seen) == 4


@pytest.mark.parametrize("place", ["first", "last"])
def test_both_ends_of_a_file_larger_than_all_samples_are_read(folder, copy, place):
    path = copy / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(100 << 20)  # a hole: takes no disk
    before = identity(copy)
    with open(path, "r+b") as file:
        file.seek(8 if place == "first" else (100 << 20) - 1)
        file.write(b"\x7f")
    assert identity(copy) != before


def test_weights_that_are_not_read_do_not_count(folder, copy):
    (copy / "model.safetensors").unlink()
    assert identity(copy, load="dummy") == identity(folder, load="dummy")


def test_the_tiny_models_of_all_families_differ(tmp_path):
    seen = set()
    for family in oracles.FAMILIES:
        oracles.config_of(family).save_pretrained(tmp_path)
        seen.add(identity(tmp_path, load="dummy"))
    assert len(seen) == len(oracles.FAMILIES)
