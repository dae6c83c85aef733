"""Damaged and hostile GGUF files: one line each, before anything is built from a count that the file cannot hold."""

import importlib.util
import random
import struct
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf

from nanokv.core.errors import PullError
from nanokv.hub.gguf import convert
from nanokv.hub.gguf_file import GGUFFile

ROOT = Path(__file__).resolve().parents[1]
KINDS = gguf.GGUFValueType


def head(num_tensors=0, num_keys=0, version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def text(value: bytes, length=None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name=b"t", dims=(32,), kind=0, offset=0, num_dims=None) -> bytes:
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return (
        text(name)
        + struct.pack("<I", len(dims) if num_dims is None else num_dims)
        + shape
        + struct.pack("<IQ", kind, offset)
    )


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not a GGUF file"),
        (b"GGU", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF\x03", "it ends inside its header"),
        (head(version=1), "version 1 of GGUF is not supported"),
        (b"GGUF\0\0\0\x03" + bytes(100), "big-endian GGUF is not supported"),
        (head(num_tensors=2**64 - 1), "18446744073709551615 tensors, at most 262144"),
        (head(num_tensors=2**18) + bytes(99), "262144 tensors in 107 bytes"),
        (head(num_keys=2**32) + bytes(99), "4294967296 keys, at most 16384"),
        (head(num_keys=1) + text(b"k", 2**63) + bytes(30), "a key has 9223372036854775808 bytes, and"),
        (head(num_keys=1) + key(b"k" * 2000, 4, bytes(4)), "a key has 2000 bytes"),
        (head(num_keys=1) + key(b"\xff\xfe", 4, bytes(4)), "a key is not in UTF-8"),
        (head(num_keys=1) + key(b"k", 8, text(b"\xff")), "k is not in UTF-8"),
        (head(num_keys=1) + key(b"k", 8, text(b"x", 2**40)), "k has 1099511627776 bytes, and 1 are left"),
        (head(num_keys=1) + key(b"k", 99, bytes(8)), "the key k is of the unknown type 99"),
        (head(num_keys=1) + key(b"k", 9, array(9, 1, bytes(30))), "the key k is of the unknown type 9"),
        (head(num_keys=1) + key(b"k", 9, array(4, 2**40, bytes(8))), "1099511627776 items of k, at most"),
        (head(num_keys=1) + key(b"k", 9, array(12, 4, bytes(30))), "4 items of k in 30 bytes"),
        (head(num_keys=1) + key(b"k", 9, array(8, 3, text(b"a", 99) + bytes(16))), "a text of k has 99 bytes"),
        (head(num_keys=1) + key(b"k", 9, array(8, 1, text(b"\xc3("))), "k is not in UTF-8"),
        (head(num_keys=2) + key(b"k", 4, bytes(4)) * 2, "the key k stands there twice"),
        (head(1, 1) + key(b"general.alignment", 4, struct.pack("<I", 12)) + tensor(), "alignment=12 is not a power"),
        (head(1) + tensor(num_dims=9) + bytes(99), "tensor t has 9 dimensions"),
        (head(1) + tensor(num_dims=0) + bytes(99), "tensor t has 0 dimensions"),
        (head(1) + tensor(dims=(2**63, 2**63)), "tensor t ends at byte"),
        (head(1) + tensor(dims=(0,)), r"tensor t is \[0\], in blocks of 1"),
        (head(1) + tensor(dims=(33,), kind=8), r"tensor t is \[33\], in blocks of 32"),
        (head(1) + tensor(kind=4711), "tensor t is of the unknown type 4711"),
        (head(1) + tensor(offset=2**63), "tensor t ends at byte"),
        (head(2) + tensor() * 2 + bytes(999), "tensor t stands there twice"),
        (head(1) + tensor(b"a\nb" * 300, kind=99), r"tensor 'a\\nba.*\.\.\. is of the unknown type 99"),
    ],
)  # fmt: skip
def test_a_count_that_the_file_cannot_hold_is_refused_in_one_line(tmp_path, data, complaint):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(PullError, match=complaint) as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_file_truncated_anywhere_is_refused_in_one_line(tmp_path):
    path, cut = tmp_path / "tiny.gguf", tmp_path / "cut.gguf"
    tiny_gguf.write(path)
    whole = path.read_bytes()
    for length in [0, 3, 4, 11, 24, 100, 500, 2000, 5000, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(PullError, match=r"cut\.gguf: (truncated or damaged|not a GGUF)") as caught:
            convert(cut, tmp_path, {}, lambda *_: None)
        assert "\n" not in str(caught.value)


def test_a_file_of_noise_is_refused_in_one_line(tmp_path):
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + np.random.default_rng(0).bytes(4000))
    with pytest.raises(PullError, match="truncated or damaged"):
        GGUFFile(path)


@pytest.mark.parametrize("layers", [2**31 - 1, 10**8, 65_536, 21])
def test_more_layers_than_the_file_has_cost_no_memory(tmp_path, layers):
    path = tmp_path / "tiny.gguf"
    more = {f"blk.{layers - 1}.attn_norm.weight": np.zeros(64, np.float32)}
    for extra in ({}, more):
        tiny_gguf.write(path, edit=tiny_gguf.replaced("llama.block_count", layers), more=extra)
        tracemalloc.start()
        with pytest.raises(PullError, match=r"block_count=|tensors missing: blk.10"):
            convert(path, tmp_path, {}, lambda *_: None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 32 << 20


@pytest.mark.parametrize("kind", [KINDS.INT8, KINDS.FLOAT32, KINDS.STRING, KINDS.BOOL])
def test_a_key_of_another_type_is_named_with_its_value(tmp_path, kind):
    value = {KINDS.FLOAT32: 2.5, KINDS.STRING: "two\nlines", KINDS.BOOL: True, KINDS.INT8: -1}[kind]

    def edit(writer):
        writer.kv_data[0].pop("llama.embedding_length")
        writer.add_key_value("llama.embedding_length", value, kind)

    tiny_gguf.write(tmp_path / "tiny.gguf", edit=edit)
    with pytest.raises(PullError) as caught:
        convert(tmp_path / "tiny.gguf", tmp_path, {}, lambda *_: None)
    assert f"llama.embedding_length={value!r}: expected an integer from 1" in str(caught.value)


def test_a_type_without_a_decoder_is_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    more = {"output_norm.weight": np.zeros(64, np.float64)}
    tiny_gguf.write(path, leave_out=("output_norm.weight",), more=more)
    (tmp_path / "model").mkdir()
    with pytest.raises(PullError, match=r"tensor output_norm.weight is of the type F64, which is not supported"):
        convert(path, tmp_path / "model", {}, lambda *_: None)


def test_mutants_of_valid_files_are_read_or_refused_in_one_line(tmp_path):
    """100 of scripts/fuzz_gguf.py, which makes thousands and watches time and memory too."""
    spec = importlib.util.spec_from_file_location("fuzz_gguf", ROOT / "scripts" / "fuzz_gguf.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    path = tmp_path / "base.gguf"
    tiny_gguf.write(path)
    data = path.read_bytes()
    header = fuzz.header_size(data)
    outcomes = {}
    for number in range(100):
        outcome, wrong = fuzz.run_one(fuzz.mutant(data, header, random.Random(number)), tmp_path)
        assert wrong is None or "CPU time" in wrong, (number, wrong)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes.keys() == {"read", "refused"}


def test_a_vocabulary_of_128_000_tokens_and_280_000_merges_opens_at_once(tmp_path):
    """It takes 0.2 s of CPU time. A reader that makes arrays for each text takes 14 s."""
    tokens = [text(b"t%d" % i) for i in range(128_000)]
    merges = [text(b"a b%d" % i) for i in range(280_000)]
    fields = key(b"tokens", 9, array(8, len(tokens), b"".join(tokens))) + key(
        b"types", 9, array(5, 128_000, bytes(512_000))
    )
    path = tmp_path / "large.gguf"
    path.write_bytes(head(0, 3) + fields + key(b"merges", 9, array(8, len(merges), b"".join(merges))))
    before = sys.getallocatedblocks()
    file = GGUFFile(path)
    assert sys.getallocatedblocks() - before < 1.1 * (128_000 + 280_000)  # one object a text
    assert (file.texts("tokens")[-1], file.texts("merges")[-1]) == ("t127999", "a b279999")
