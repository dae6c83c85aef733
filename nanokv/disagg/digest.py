"""Whether two processes compute the same thing: one digest over all that shapes the bytes of a page.

Weights are sampled, because reading all of them would double the start of a large model: the header of each file, its
size, and 64 blocks of 1 MiB spread over it. That tells apart other models, other quantisations, other fine-tunings
and cut files; it is no defence against somebody who forges a file. A change of nanokv that writes other bytes into a
page raises messages.VERSION.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from nanokv.core.config import EngineConfig
from nanokv.core.spec import PageLayout
from nanokv.disagg.messages import VERSION
from nanokv.models.config import ModelConfig

_BLOCK = 1 << 20
_BLOCKS = 64


def digest_of(folder: Path, model: ModelConfig, config: EngineConfig, dtype: str, layout: PageLayout) -> str:
    """Hexadecimal SHA-256 of weights, config, codec, dtype, page size and layout, length-framed and typed."""
    fields: dict[str, Any] = {
        "protocol": VERSION,
        "model": asdict(model),
        "dtype": dtype,
        "codec": ["raw"] if config.codec == "raw" else [config.codec, config.native_layers, config.prefill],
        "page_size": layout.page_size,
        "page_bytes": layout.page_bytes,
        "state_bytes": layout.state_bytes,
        "planes": [
            [
                [plane.name, list(plane.shape), str(plane.dtype)]
                for plane in (*spec.paged, *spec.state, *spec.partial_page)
            ]
            for spec in layout.specs
        ],
        "weights": ["dummy", config.seed] if config.load == "dummy" else _weights(folder),
    }
    return hashlib.sha256(msgspec.msgpack.encode(fields, enc_hook=str, order="deterministic")).hexdigest()


def _weights(folder: Path) -> list[list[Any]]:
    """[name, bytes, SHA-256 of the samples] of each file of weights."""
    files = []
    for path in sorted(folder.glob("*.safetensors")):
        size, digest = path.stat().st_size, hashlib.sha256()
        with open(path, "rb") as file:
            for place in range(_BLOCKS):
                file.seek(max(0, (size - _BLOCK) * place // (_BLOCKS - 1)))
                digest.update(file.read(_BLOCK))
        files.append([path.name, size, digest.hexdigest()])
    return files
