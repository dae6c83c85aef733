"""GGUF files, converted back to the checkpoint they were made from. A few million numbers are in memory at one time."""

from __future__ import annotations

import json
from collections.abc import Callable
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

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, units done, units in all or None). Stages are "wait", "fetch", "verify" and "convert"."""


def convert(path: Path, model: Path, generation: dict, progress: Progress) -> None:
    """Writes the checkpoint of a GGUF file: config, weights rounded to bf16, tokenizer, template.

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


def _write_weights(file: GGUFFile, table: list[Tensor], path: Path, progress: Progress) -> None:
    """One safetensors file, written tensor by tensor: 8 bytes of header length, a JSON header, the data."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in table:
        dtype, size = ("F32", 4) if tensor.exact else ("BF16", 2)
        start, end = end, end + size * prod(tensor.shape)
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for done, tensor in enumerate(table):
            progress("convert", done, len(table))
            for numbers in tensor.read(file):
                values = torch.from_numpy(np.array(numbers, dtype=np.float32))
                stored = values if tensor.exact else values.to(torch.bfloat16)
                out.write(stored.view(torch.uint8).numpy().data)
        progress("convert", len(table), len(table))
