"""Folders that load, and folders that do not: every error is one line that names the file or all the tensors."""

import json
from dataclasses import replace

import oracles
import pytest
import torch
from harness import Rig, load
from safetensors.torch import load_file, save_file

from nanokv.core.errors import CheckpointError
from nanokv.models.read import read_folder
from nanokv.models.weights import BANK, dummy

pytestmark = pytest.mark.usefixtures("threads")
PROMPT = oracles.prompt(20)


def logits(folder, **options):
    return Rig(load(folder, **options)).run(PROMPT, len(PROMPT))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tied and an untied model, never written to by the tests."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {tied: oracles.llama(root / f"tied-{tied}", tie_word_embeddings=tied) for tied in (True, False)}


@pytest.fixture
def edit(checkpoints, tmp_path):
    """Copies a checkpoint, lets the test change its tensors, returns the folder."""

    def edited(change, tied=False):
        tensors = load_file(checkpoints[tied] / "model.safetensors")
        change(tensors)
        (tmp_path / "config.json").write_bytes((checkpoints[tied] / "config.json").read_bytes())
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return edited


def refused(folder, *words):
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_shards_load_as_one_file_does(checkpoints, tmp_path):
    oracles.llama(tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path), logits(checkpoints[False]))


def test_a_single_file_may_have_any_name(checkpoints, edit):
    folder = edit(lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert torch.equal(logits(folder), logits(checkpoints[False]))


def test_tensors_that_follow_from_the_config_are_ignored(checkpoints, edit):
    folder = edit(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits(folder), logits(checkpoints[False]))


def test_a_head_beside_tied_embeddings_must_be_equal(checkpoints, edit):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert torch.equal(logits(edit(add_head, tied=True)), logits(checkpoints[True]))
    refused(
        edit(lambda t: t.update({"lm_head.weight": torch.zeros(256, 64)}), tied=True),
        "lm_head.weight differs from model.embed_tokens.weight",
        "tie_word_embeddings",
    )


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")], ids=str)
def test_equal_numbers_in_different_dtypes_are_equal(edit, dtypes):
    numbers = torch.randint(-128, 128, (256, 64)) / 64
    head, table = (numbers.to(getattr(torch, dtype)) for dtype in dtypes)

    def both(tensors):
        tensors.update({"lm_head.weight": head, "model.embed_tokens.weight": table})

    def off_by_one_bit(tensors):
        both(tensors)
        tensors["lm_head.weight"] = numbers.float().nextafter(torch.tensor(9.0))

    load(edit(both, tied=True))
    refused(edit(off_by_one_bit, tied=True), "lm_head.weight differs from model.embed_tokens.weight")


def test_two_names_of_one_tensor_are_an_error(edit):
    name = "model.layers.0.mlp.up_proj.weight"
    other = name.replace("model.", "model.language_model.")
    refused(edit(lambda t: t.update({other: t[name] + 1})), f"two tensors for {name}: {other} and {name} of model.")


def test_a_tensor_of_all_experts_that_does_not_divide_is_not_split(tmp_path):
    folder = oracles.checkpoint("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    experts = "model.layers.0.mlp.experts"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(experts)}
    for shape in ([8, 65, 64], [1 << 50, 2, 0], [9, 64, 64]):
        tensors[f"{experts}.gate_up_proj"] = torch.empty(shape)
        save_file(tensors, folder / "model.safetensors")
        refused(folder, f"unexpected: {experts}.gate_up_proj", f"missing: {experts}.{{0-7}}")


def test_names_that_a_stranger_wrote_stay_on_one_short_line(edit):
    strange = ["a\nb", "a\x1b[2J", "x" * 5000, "model.layers." + "9" * 5000 + ".mlp.up_proj.weight"]
    many = [f"extra{i}" for i in range(5000)]
    folder = edit(lambda t: t.update({name: torch.zeros(0) for name in (*strange, *many)}))
    with pytest.raises(CheckpointError, match="more") as error:
        load(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 5000


def test_everything_that_does_not_fit_is_named_at_once(edit):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(32, 64)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(64, 128).to(torch.float8_e4m3fn)
        tensors["model.layers.1.input_layernorm.weight"] = torch.ones(64, dtype=torch.int32)

    refused(
        edit(change),
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;",
        "unexpected: model.layers.0.self_attn.q_norm.weight;",
        "misshapen: model.layers.0.self_attn.q_proj.weight is [32, 64], config.json asks for [64, 64];",
        "model.layers.0.mlp.down_proj.weight is F8_E4M3",
        "model.layers.1.input_layernorm.weight is I32",
    )


def test_a_long_list_is_folded_by_layers_and_names_all(checkpoints):
    config = replace(read_folder(checkpoints[False]), num_layers=6, layer_types=("full_attention",) * 6)
    with pytest.raises(CheckpointError) as error:
        load(checkpoints[False], config=config)
    for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
        assert f"model.layers.{{2-5}}.{name}.weight" in str(error.value)


def test_an_extra_layer_is_not_dropped(checkpoints, edit):
    folder = edit(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    refused(folder, "unexpected: model.layers.1.")


@pytest.mark.parametrize("damage", ["truncated", "empty", "pointer", "noise"])
def test_a_damaged_file_is_named(checkpoints, edit, damage):
    folder = edit(lambda tensors: None)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n",
            "noise": bytes(range(256)) * 64,
        }[damage]
    )
    refused(folder, "model.safetensors", "the file is damaged")


def test_a_missing_shard_is_named(tmp_path):
    oracles.llama(tmp_path, shard="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, lost.name, "no such file")


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_names_no_files_is_refused(checkpoints, edit, index):
    folder = edit(lambda tensors: None)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json")


def test_a_folder_without_weights_is_refused(checkpoints, edit):
    folder = edit(lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "no *.safetensors")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors")
    refused(folder, "2 files and no model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="not a folder"):
        load(folder / "config.json", config=read_folder(folder))


def test_weights_are_converted_to_the_requested_dtype(checkpoints):
    exact = logits(checkpoints[False])
    rounded = logits(checkpoints[False], dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.2


def test_dummy_weights_need_no_files_and_follow_the_seed(checkpoints, tmp_path):
    config = read_folder(checkpoints[True])
    first, again, other = (logits(tmp_path / "nowhere", config=config, load="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.isfinite().all() and first.std() > 0


def test_dummy_weights_have_the_stated_standard_deviation(checkpoints):
    read = dummy(torch.float32, seed=0)
    big = read("big", (1030, 4096))
    assert big.numel() > BANK and big.std() == pytest.approx(0.02, rel=0.01) and abs(big.mean()) < 1e-4
    assert not torch.equal(read("big", (1030, 4096)), big), "no two tensors are the same"
    assert torch.equal(read("norm.weight", (8,)), torch.ones(8))


def test_progress_counts_every_tensor(checkpoints):
    seen = []
    load(checkpoints[False], progress=lambda taken, total: seen.append((taken, total)))
    assert seen[-1] == (21, 21) and seen == sorted(seen)
