"""GGUF files, converted back to the checkpoint they were made from. A few million numbers are in memory at one time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nanokv.hub.folder import write_json
from nanokv.hub.gguf_config import read_config
from nanokv.hub.gguf_file import GGUFFile
from nanokv.hub.gguf_tensors import Tensor, tensors
from nanokv.hub.gguf_tokenizer import build_tokenizer
from nanokv.hub.gguf_tokens import end_ids, token_texts
from nanokv.hub.home import Q8_FILE

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, units done, units in all or None). Stages are "wait", "fetch", "verify" and "convert"."""

_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}
"""Bytes of a number, by its dtype as safetensors names it."""


def convert(path: Path, model: Path, generation: dict, progress: Progress) -> None:
    """Writes the checkpoint of a GGUF file: config, weights (rounded to bf16, and blocks Q8_0), tokenizer, template.

    path         of the GGUF file, or of the first of its parts
    model        an existing, empty folder
    generation   sampling defaults that generation_config.json gets with the special token ids
    progress     called after each tensor
    Raises       PullError, one line, for a file that is damaged or not supported; OSError where the disk fails
    """
    file = GGUFFile(path)
    config = read_config(file)
    table = tensors(file, config)
    tokenizer, tokenizer_config = build_tokenizer(file)
    template = file.text("tokenizer.chat_template", "")
    (model / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    tokenizer_config["model_max_length"] = config["max_position_embeddings"]
    write_json(model / "tokenizer_config.json", tokenizer_config)
    if template:
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    ends = end_ids(file, token_texts(file))
    special = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config[key] is not None}
    special |= {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    write_json(model / "generation_config.json", {**special, **generation})
    write_json(model / "config.json", config)
    _write_weights(file, table, model / "model.safetensors", progress)
    _write_blocks(file, table, model / Q8_FILE)


def _write_weights(file: GGUFFile, table: list[Tensor], path: Path, progress: Progress) -> None:
    """All tensors, in bfloat16 or, where exact, in float32."""
    import torch

    def numbers() -> Iterator[np.ndarray]:
        for done, tensor in enumerate(table):
            progress("convert", done, len(table))
            for part in tensor.read(file):
                values = torch.from_numpy(np.array(part, dtype=np.float32))
                stored = values if tensor.exact else values.to(torch.bfloat16)
                yield stored.view(torch.uint8).numpy()

    _write(path, [(one.name, "F32" if one.exact else "BF16", one.shape) for one in table], numbers())
    progress("convert", len(table), len(table))


def _write_blocks(file: GGUFFile, table: list[Tensor], path: Path) -> None:
    """The matrices in blocks Q8_0: codes int8 [out, in] and scales float16 [out, in / 32].

    Writes no file where there are none. Engines with 8-bit weights read it beside the rounded numbers.
    """
    coded = [one for one in table if one.blocks(file) is not None]
    if not coded:
        return

    def parts() -> Iterator[np.ndarray]:
        for one in coded:
            blocks = one.blocks(file)
            assert blocks is not None
            yield blocks[..., 2:]
            yield blocks[..., :2]

    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for name, (rows, columns) in ((one.name, one.shape) for one in coded):
        entries += [(name, "I8", (rows, columns)), (f"{name}_scale", "F16", (rows, columns // 32))]
    _write(path, entries, parts())


def _write(path: Path, entries: list[tuple[str, str, tuple[int, ...]]], data: Iterator[np.ndarray]) -> None:
    """One safetensors file: 8 bytes of header length, a JSON header, the data.

    entries   name, dtype and shape of each tensor
    data      their bytes, one tensor after the other, in any number of pieces: uint8
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        start, end = end, end + _SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in data:
            out.write(np.ascontiguousarray(piece).data)
