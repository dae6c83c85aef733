"""Mutants: a valid model folder with one to three random changes to one of its files. A seed determines each."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hostile.cases import pack, split

VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 16, 32, 33, 2**16, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 0.5, 1e308, 1e-320, -1e308,
    float("nan"), float("inf"), "", "x", "BF16", "F8_E4M3", "U8", "x" * 3000, "a\nb", "\ud800", "model-1.safetensors",
    "../x", True, False, None, [], [1], [0, 0], [2**40, 1], {}, {"a": {"b": []}}, [[[[[[1]]]]]],
)  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [] if not path else [path]
    for key, value in items:
        found += places(value, (*path, key))
    return found


def mutate_json(rng: random.Random, content: Any) -> None:
    """Changes, deletes, renames or copies a random value, in place."""
    paths = places(content)
    if not paths:
        return
    *above, key = rng.choice(paths)
    node = content
    for step in above:
        node = node[step]
    match rng.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice([*node, "x", key + "x", key.replace(".0.", ".1."), "a\nb"])] = node.pop(key)
        case 2 if isinstance(node, dict):
            node[key] = node[rng.choice(list(node))]
        case 3 if isinstance(node[key], int):
            node[key] += rng.choice((-1, 1, 8, -8, node[key]))
        case 4 if isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), rng.choice(VALUES))
        case _:
            node[key] = rng.choice(VALUES)


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Flips, cuts, doubles or clears bytes; mostly near the start, where a header stands."""
    data = bytearray(raw)
    if not data:
        return bytes(data)
    near = min(len(data), 4096) if rng.random() < 0.7 else len(data)
    start = rng.randrange(near)
    end = min(len(data), start + rng.choice((1, 2, 8, 64, 512)))
    match rng.randrange(6):
        case 0:
            del data[start:]
        case 1:
            del data[start:end]
        case 2:
            data[start:start] = data[start:end]
        case 3:
            data[start:end] = bytes(end - start)
        case 4:
            data[start:end] = rng.randbytes(end - start)
        case _:
            for _ in range(rng.choice((1, 1, 4, 32))):
                data[rng.randrange(near)] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutate(folder: Path, seed: str) -> str:
    """Changes a folder in place. Returns the name of the changed file."""
    rng = random.Random(seed)
    path = rng.choice(sorted(file for file in folder.iterdir()))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        raw = path.read_bytes()
        try:
            if rng.random() < 0.35:
                raise ValueError("a change of bytes was drawn")
            if path.suffix == ".json":
                content = json.loads(raw)
                mutate_json(rng, content)
                raw = json.dumps(content).encode(errors="surrogatepass")
            else:
                header, data = split(raw)
                mutate_json(rng, header)
                raw = pack(json.dumps(header).encode(errors="surrogatepass"), data)
        except (ValueError, RecursionError):  # no JSON any more after the change before
            raw = mutate_bytes(rng, raw)
        path.write_bytes(raw)
    return path.name
