"""Hostile model folders by name: what a stranger may put in the place of each file. A case changes a valid folder."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Case = tuple[str, Callable[[Path], object]]
"""The name of the valid folder (hostile/models.py) and the change."""
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
NUMBERS = (0, -1, 10**6, 2**31, 2**63, 10**30, 1.5, 1e308, "1", True, None, [1], {})
COUNTS = (
    "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings",
)  # fmt: skip


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def pack(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header (an object, or bytes) and data; `length` stands in for that of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def change_header(folder: Path, change: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> None:
    """Changes the header of a safetensors file in place."""
    header, data = split((folder / name).read_bytes())
    change(header)
    (folder / name).write_bytes(pack(header, data))


def change_json(folder: Path, name: str, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))


def set_first(folder: Path, field: str, value: Any) -> None:
    """Sets a field of the first tensor in the header."""
    change_header(folder, lambda header: header[min(set(header) - {"__metadata__"})].__setitem__(field, value))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Writes a file."""
    (folder / name).write_bytes(content)


def special(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """Puts a file that is not a regular one in the place of a file."""
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


def huge(path: Path) -> None:
    """Writes a JSON file of 40 MB."""
    path.write_bytes(b'{"a": "' + b"x" * (40 << 20) + b'"}')


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: os.mkfifo(path),
    "linked-pipe": lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to("pipe")),
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "tty": lambda path: path.symlink_to("/dev/tty"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("nowhere"),
}


def of_files() -> dict[str, Case]:
    """Files that are no files, or hold something else."""
    found: dict[str, Case] = {}
    for name in (CONFIG, "generation_config.json", WEIGHTS, "hf_quant_config.json"):
        for kind, make in SPECIAL.items():
            found[f"{name}-{kind}"] = "llama", partial(special, name=name, make=make)
    for name in (INDEX, "model-1.safetensors"):
        for kind, make in SPECIAL.items():
            found[f"{name}-{kind}"] = "shards", partial(special, name=name, make=make)
    for name in (CONFIG, "generation_config.json", INDEX, "hf_quant_config.json"):
        for kind, content in {
            "deep": DEEP.encode(), "deep-list": b"[" * 10**6, "empty": b"", "list": b"[]", "null": b"null",
            "binary": bytes(range(256)) * 16, "utf16": '{"a": 1}'.encode("utf-16"), "bom": b"\xef\xbb\xbf{}",
            "digits": b'{"a": ' + b"9" * 10_000 + b"}", "nan": b'{"eos_token_id": NaN, "weight_map": NaN}',
        }.items():  # fmt: skip
            found[f"{name}-{kind}"] = "shards", partial(replace_file, name=name, content=content)
        found[f"{name}-40MB"] = "shards", partial(special, name=name, make=huge)
    return found


def of_safetensors() -> dict[str, Case]:
    """Headers of safetensors files that lie, and files that are cut."""

    def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        return partial(change_header, change=change)

    def tensor(name: str, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
        return {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}

    def extra(count: int) -> Callable[[Path], object]:
        return header(lambda h: [h.update(tensor(f"x{i}", [0])) for i in range(count)])

    def same_place(h: dict[str, Any]) -> None:
        norms = [name for name in h if name.endswith("norm.weight")]
        for name in norms:
            h[name]["data_offsets"] = h[norms[0]]["data_offsets"]

    changes = {
        "empty": raw(lambda b: b""), "7-bytes": raw(lambda b: b[:7]), "half": raw(lambda b: b[: len(b) // 2]),
        "pointer": raw(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n"),
        "length-2^63": raw(lambda b: pack(*split(b), length=2**63 - 1)),
        "length-2^64": raw(lambda b: pack(*split(b), length=2**64 - 1)),
        "length-99MB": raw(lambda b: pack(*split(b), length=99_000_000)),
        "length-0": raw(lambda b: pack(*split(b), length=0)),
        "header-deep": raw(lambda b: pack(DEEP.encode(), b"")), "header-list": raw(lambda b: pack(b"[]", b"")),
        "header-90MB": raw(lambda b: pack(b'{"a":"' + b"x" * 90_000_000 + b'"}', b"")),
        "more-data": raw(lambda b: b + b"\0" * 1000), "only-header": raw(lambda b: pack(split(b)[0], b"")),
        "nan": raw(lambda b: pack(split(b)[0], b"\xff" * len(split(b)[1]))),
        "inf": raw(lambda b: pack(split(b)[0], b"\x80\x7f" * (len(split(b)[1]) // 2))),
        "100,000-more": extra(100_000), "20,000-more": extra(20_000), "same-place": header(same_place),
        "strange-names": header(lambda h: [h.update(tensor(n, [0])) for n in ("a\nb", "\x1b[2J", "x" * 100_000, "")]),
        "layer-10^5000": header(lambda h: h.update(tensor("model.layers." + "9" * 5000 + ".mlp.up_proj.weight", [0]))),
        "other-name": header(lambda h: h.update(tensor("model.language_model.norm.weight", [0]))),
        "metadata-list": header(lambda h: h.update({"__metadata__": [1]})),
        "no-tensors": header(lambda h: h.clear()),
    }  # fmt: skip
    found: dict[str, Case] = {f"st-{name}": ("llama", change) for name, change in changes.items()}
    for shape in ([2**62, 2], [-1, 32], [2**32, 2**32], [0, 32], [], [1] * 1000, "x", [1.5], [2**64], None):
        found[f"st-shape-{str(shape)[:12]}"] = "llama", partial(set_first, field="shape", value=shape)
    for offsets in ([2**40, 2**40 + 10], [100, 10], [-1, 5], [0], [0, 2**64], "x", None):
        found[f"st-offsets-{str(offsets)[:12]}"] = "llama", partial(set_first, field="data_offsets", value=offsets)
    for dtype in ("I64", "F8_E4M3", "F8_E5M2", "F4", "U8", "BOOL", "C64", "Q9", "", 7, None):
        for seed in ("llama", "fp8", "nvfp4"):
            name = WEIGHTS if seed != "nvfp4" else "model-0.safetensors"
            change = partial(change_header, change=_dtypes(dtype), name=name)
            found[f"st-dtype-{dtype}-{seed}"] = seed, change
    for shape in ([2**50, 32, 0], [4, 33, 32], [0, 0, 0], [4, 0, 32], [2**40], [1] * 9):
        change = partial(change_header, change=_experts(shape))
        found[f"st-experts-{shape[:3]}"] = "experts", change
    return found


def _dtypes(dtype: Any) -> Callable[[dict[str, Any]], object]:
    """Gives every projection another dtype, of as many bytes where it is as wide."""
    return lambda header: [
        header[name].update(dtype=dtype) for name in header if name.endswith(("_proj.weight", "_scale"))
    ]


def _experts(shape: list[int]) -> Callable[[dict[str, Any]], object]:
    """Puts a tensor of another size in the place of one that holds all experts, its data left to another name."""
    entry, name = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}, "model.layers.0.mlp.experts.gate_up_proj"
    return lambda header: header.update({"x": header[name], name: entry})


def of_indexes() -> dict[str, Case]:
    """Indexes that name other files than those of the folder, or other tensors than those of the files."""
    names = (
        "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "config.json", "a\0b",
        "a\nb", "x" * 5000, "..", ".", "", "C:\\x", "sub/model.safetensors", "\ud800", "nowhere.safetensors",
    )  # fmt: skip
    found: dict[str, Case] = {}
    for name in names:
        change = partial(change_json, name=INDEX, weight_map={"model.norm.weight": name})
        found[f"ix-{ascii(name)[:20]}"] = "shards", change
    for kind, content in {
        "list": [], "empty": {}, "numbers": {"a": 1}, "null": None, "lists": {"a": ["model-0.safetensors"]},
        "lacking": {f"x{i}": "model-0.safetensors" for i in range(100_000)},
        "10,000-files": {f"x{i}": f"{i}.safetensors" for i in range(10_000)},
    }.items():  # fmt: skip
        found[f"ix-map-{kind}"] = "shards", partial(change_json, name=INDEX, weight_map=content)
    return found


def of_configs() -> dict[str, Case]:
    """Fields of config.json and generation_config.json with values that no model has."""
    found: dict[str, Case] = {}
    for field in COUNTS:
        for value in NUMBERS:
            found[f"cf-{field}-{str(value)[:8]}"] = "llama", partial(change_json, name=CONFIG, **{field: value})
    for field in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
        for value in NUMBERS:
            found[f"cf-{field}-{str(value)[:8]}"] = "experts", partial(change_json, name=CONFIG, **{field: value})
    for field in ("kv_lora_rank", "q_lora_rank", "n_routed_experts", "n_group", "num_nextn_predict_layers"):
        for value in NUMBERS:
            found[f"cf-{field}-{str(value)[:8]}"] = "latent", partial(change_json, name=CONFIG, **{field: value})
    for field, values in {
        "rms_norm_eps": (0, -1, 1e308, 1e-320, "x"), "rope_theta": (0, -1, 1e308, 1e-320, "x"),
        "model_type": (["llama"], "", 1, "x" * 10_000), "architectures": ({"a": 1}, [1], "x", ["x" * 10_000]),
        "torch_dtype": ("complex128", [1], "x" * 10_000), "eos_token_id": (10**12, -1, list(range(5000)), [[1]], "x"),
        "quantization_config": (
            [], 1, {}, {"quant_method": ["fp8"]}, {"quant_method": "x" * 10_000}, {"quant_method": "awq"},
            {"quant_method": "fp8", "weight_block_size": [2**63, 2**63]},
            {"quant_method": "fp8", "weight_block_size": [0, 0]}, {"quant_method": "fp8", "weight_block_size": "x"},
            {"quant_method": "fp8", "modules_to_not_convert": ["x" * 100] * 10_000},
        ),
        "rope_scaling": (
            "x", {"rope_type": ["x"]}, {"rope_type": "linear", "factor": -1}, {"rope_type": "linear", "factor": 1e-300},
            {"rope_type": "yarn", "factor": 1e30, "original_max_position_embeddings": 10**9},
            {"rope_type": "llama3", "factor": 8},
        ),
    }.items():  # fmt: skip
        for place, value in enumerate(values):
            seed = "fp8" if field == "quantization_config" else "llama"
            found[f"cf-{field}-{place}"] = seed, partial(change_json, name=CONFIG, **{field: value})
    for value in (*NUMBERS, 1e-320, "hot", [[1]], [2**70] * 1000):
        change = partial(change_json, name="generation_config.json", eos_token_id=value)
        found[f"gc-eos_token_id-{str(value)[:8]}"] = "llama", change
    return found


def all_cases() -> dict[str, Case]:
    """Every case by name."""
    return of_files() | of_safetensors() | of_indexes() | of_configs()
