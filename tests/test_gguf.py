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
from nanokv.hub.gguf import convert
from nanokv.hub.gguf_file import GGUFFile
from nanokv.hub.gguf_tensors import undo_permutation


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
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "temperature": 0.5}
    assert (model / "chat_template.jinja").read_text() == tiny_gguf.TEMPLATE


def test_the_catalog_says_of_smollm2_what_its_file_says(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config == CATALOG["smollm2-135m-instruct"].config
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.2, 0.9)
    ends = generation["eos_token_id"]
    assert ends == 2 or 2 in ends  # a folder that an earlier version pulled has one


def test_another_architecture_is_refused_and_the_supported_ones_are_named(tmp_path):
    assert "'gemma3' is not supported; supported are llama, qwen2, qwen3," in refused(tmp_path, arch="gemma3")


def test_missing_tensors_are_named(tmp_path):
    assert "tensors missing: blk.1.ffn_up.weight" in refused(tmp_path, leave_out=("blk.1.ffn_up.weight",))


def test_unknown_tensors_are_named(tmp_path):
    more = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    assert "tensors unknown: blk.0.attn_q.bias" in refused(tmp_path, more=more)


def test_misshapen_tensors_are_named(tmp_path):
    more = {"output_norm.weight": np.zeros(63, np.float32)}
    message = refused(tmp_path, leave_out=("output_norm.weight",), more=more)
    assert "of the wrong shape: output_norm.weight [63]" in message


def split(folder, count=2, **keys):
    """Writes a model in parts, and returns the first part and the whole."""
    tiny_gguf.write(folder / "whole.gguf")
    names = sorted(GGUFFile(folder / "whole.gguf").tensor_names)
    for number in range(count):
        own = {"split.no": number, "split.count": count, "split.tensors.count": len(names), **keys}

        def edit(writer, own=own):
            for key, value in own.items():
                writer.add_uint16(key, value)

        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        tiny_gguf.write(path, only=set(names[number::count]), edit=edit)
    return folder / f"m-00001-of-{count:05}.gguf", folder / "whole.gguf"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_part_of_a_split_file_reads_all_parts(tmp_path, count):
    first, whole = split(tmp_path, count)
    for path in (first, whole):
        (tmp_path / path.stem).mkdir()
        convert(path, tmp_path / path.stem, {}, silent)
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert all((tmp_path / first.stem / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_a_part_that_is_missing_or_not_the_first_is_named(tmp_path):
    first, _ = split(tmp_path)
    second = tmp_path / "m-00002-of-00002.gguf"
    with pytest.raises(PullError, match=r"part 2 of 2 of a split file; give the first, m-00001-of-00002.gguf"):
        GGUFFile(second)
    for path in (first, second):
        with pytest.raises(PullError, match=r"parts are named NAME-00001-of-00002.gguf"):
            GGUFFile(path.rename(tmp_path / "other.gguf"))
        (tmp_path / "other.gguf").rename(path)
    bytes_of_first = first.read_bytes()
    second.unlink()
    with pytest.raises(PullError, match=r"part 2 of 2 is missing: .*m-00002-of-00002.gguf"):
        GGUFFile(first)
    second.write_bytes(bytes_of_first)
    with pytest.raises(PullError, match=r"m-00002-of-00002.gguf: not part 2 of 2"):
        GGUFFile(first)


def test_parts_that_hold_other_tensors_than_counted_are_refused(tmp_path):
    first, _ = split(tmp_path, **{"split.tensors.count": 7})
    with pytest.raises(PullError, match="its 2 parts hold 20 tensors instead of 7"):
        GGUFFile(first)
