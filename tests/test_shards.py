"""Which file holds a tensor, and which files are opened at all: the index decides, and files have bounds."""

import json
import os
import struct
from pathlib import Path

import oracles
import pytest
import torch
from harness import load
from safetensors.torch import load_file, save_file
from test_identity import identity

from nanokv.core.errors import CheckpointError
from nanokv.models.checkpoint import Checkpoint
from nanokv.models.read import read_folder
from nanokv.models.shards import INDEX, MAX_HEADER

pytestmark = pytest.mark.usefixtures("threads")
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A tiny llama in two shards with an index: NAME is in the second."""
    oracles.llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    owners = {name: f"{1 + name.startswith('model.layers.1')}.safetensors" for name in tensors}
    for shard in set(owners.values()):
        save_file({name: tensor for name, tensor in tensors.items() if owners[name] == shard}, tmp_path / shard)
    write_index(tmp_path, owners)
    return tmp_path


def write_index(folder: Path, owners: dict) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owners}))


def owners_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def add(path: Path, **tensors) -> None:
    save_file(load_file(path) | tensors, path)


def read(folder: Path, name: str) -> torch.Tensor:
    checkpoint = Checkpoint(folder, read_folder(folder), torch.float32)
    return checkpoint.read(name, ()).clone()


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert all(word in message for word in words) and message.isprintable(), message


@pytest.mark.parametrize("copy", ["1.safetensors", "3.safetensors", "model.safetensors"])
def test_the_index_decides_which_file_holds_a_tensor(folder, copy):
    right = read(folder, NAME)
    stale = {NAME: right + 1}
    if copy == "1.safetensors":
        add(folder / copy, **stale)
    else:
        save_file(stale, folder / copy)
    assert torch.equal(read(folder, NAME), right)
    load(folder)


def test_an_index_that_names_the_other_copy_is_another_model(folder):
    right, before = read(folder, NAME), identity(folder)
    add(folder / "1.safetensors", **{NAME: right + 1})
    assert (stale := identity(folder)) != before
    write_index(folder, owners_of(folder) | {NAME: "1.safetensors"})
    assert torch.equal(read(folder, NAME), right + 1)
    assert len({before, stale, identity(folder)}) == 3


def test_a_file_that_is_not_loaded_does_not_change_the_identity(folder):
    before = identity(folder)
    save_file({NAME: torch.zeros(1)}, folder / "consolidated.safetensors")
    assert identity(folder) == before


def test_one_tensor_in_two_files_without_a_place_in_the_index_is_an_error(folder):
    owners = owners_of(folder)
    del owners[NAME]
    write_index(folder, owners)
    load(folder)  # one file has it
    add(folder / "1.safetensors", **{NAME: torch.zeros(64, 128)})
    refused(folder, f"two tensors for {NAME}")


def test_the_same_tensor_in_two_files_without_an_index_is_an_error(folder):
    (folder / INDEX).unlink()
    refused(folder, "2 files and no model.safetensors.index.json")


def test_a_tensor_that_its_file_lacks_is_named(folder):
    write_index(folder, owners_of(folder) | {NAME: "1.safetensors", "model.layers.0.extra": "2.safetensors"})
    refused(folder, "1.safetensors: lacks tensors that the index places there: " + NAME)


@pytest.mark.parametrize(
    "name",
    ["../up.safetensors", "/etc/passwd", "sub/1.safetensors", "..", ".", "", "C:1.safetensors", "a\\b", "a\0b", "a\nb",
     "x" * 5000, "\ud800"],
    ids=ascii,
)  # fmt: skip
def test_an_index_names_plain_files_of_its_own_folder(folder, name):
    write_index(folder, owners_of(folder) | {NAME: name})
    refused(folder, INDEX, "expected a file name inside this folder")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def linked_pipe(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    path.symlink_to("pipe")


SPECIAL = {
    "pipe": pipe,
    "linked pipe": linked_pipe,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["2.safetensors", "model.safetensors"])
def test_pipes_devices_and_folders_are_never_opened(folder, kind, name):
    if name == "model.safetensors":
        (folder / INDEX).unlink()
    (folder / name).unlink(missing_ok=True)
    SPECIAL[kind](folder / name)
    refused(folder, name)
    with pytest.raises(CheckpointError):
        identity(folder)


def test_shards_may_be_links_out_of_the_folder(folder, tmp_path_factory):
    blob = tmp_path_factory.mktemp("blobs") / "0123abcd"
    (folder / "2.safetensors").rename(blob)
    (folder / "2.safetensors").symlink_to(blob)  # as the cache of huggingface_hub has them
    load(folder)


def test_a_file_that_is_mostly_header_is_refused_unopened(folder):
    header = json.dumps({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40_000)})
    assert len(header) > MAX_HEADER
    (folder / "2.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    refused(folder, "2.safetensors: its header has", "no model has so many tensors")
