"""model_identity: one digest over everything that shapes the bytes of a page. Equal digests: pages can be exchanged.

Weights are sampled, because reading all of them would double the start of a large model: the name and the size of each
file that is loaded, 64 blocks of 1 MiB spread over it, its header among them, and the index. That tells apart other
models, other quantisations, other fine-tunings and truncated files; it is no defence against a forged file. A
quantised checkpoint and a plain one of the same numbers differ, which costs a miss and never a wrong token. The means
of keys (center_keys) are measured by an engine and not covered: pages made with them cannot be exchanged.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from nanokv.core.config import EngineConfig
from nanokv.core.spec import PageLayout
from nanokv.hub.home import Q8_FILE
from nanokv.models.config import ModelConfig
from nanokv.models.shards import Shards, find_shards, shard_size

_BLOCK = 1 << 20
_BLOCKS = 64


def model_identity(
    folder: Path, model: ModelConfig, config: EngineConfig, dtype: str, layout: PageLayout, version: int
) -> str:
    """Digests the weights and their form, the model's config, codec, dtype, kernels, page size and layout.

    folder    holds the *.safetensors; not read when config.load is "dummy", and then their quantisation does not count
    config    of the engine; only the fields that change the bytes of a page count
    dtype     of the weights, as resolved: "float32", "bfloat16", "float16"
    layout    of the pages
    version   of the caller's format; a change of nanokv that writes other bytes into a page raises it
    Returns   SHA-256 over typed, length-framed fields (MessagePack), 64 hexadecimal digits
    Raises    CheckpointError for files of weights that cannot be read, and for an index that is not valid
    """
    described = asdict(model)
    if config.load == "dummy":
        del described["quantization"]
    layers = [(*spec.paged, *spec.state, *spec.partial_page) for spec in layout.specs]
    fields: dict[str, Any] = {
        "version": version,
        "model": described,
        "dtype": dtype,
        "codec": ["raw"] if config.codec == "raw" else [config.codec, config.native_layers, config.prefill],
        "kernels": config.kernels,
        "matrices": config.weights,
        "page_size": layout.page_size,
        "page_bytes": layout.page_bytes,
        "state_bytes": layout.state_bytes,
        "planes": [[[plane.name, list(plane.shape), str(plane.dtype)] for plane in layer] for layer in layers],
        "weights": ["dummy", config.seed] if config.load == "dummy" else _weights(folder, config.weights == "q8"),
    }
    return hashlib.sha256(msgspec.msgpack.encode(fields, enc_hook=str, order="deterministic")).hexdigest()


def _weights(folder: Path, with_codes: bool = False) -> list[Any]:
    """[name, bytes, SHA-256 of the samples] of each file of weights, then the file of each tensor as an index says."""
    shards = find_shards(folder) if any(folder.glob("*.safetensors")) else Shards([])
    files: list[Any] = []
    codes = [folder / Q8_FILE] if with_codes and (folder / Q8_FILE).exists() else []
    for path in [*shards.files, *codes]:
        size, digest = shard_size(path), hashlib.sha256()
        with open(path, "rb") as file:
            for place in range(_BLOCKS):
                file.seek(max(0, (size - _BLOCK) * place // (_BLOCKS - 1)))
                digest.update(file.read(_BLOCK))
        files.append([path.name, size, digest.hexdigest()])
    return [*files, shards.owners]
