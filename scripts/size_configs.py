"""Sizes the caches of many config.json files, and compares each answer with one computed from the raw JSON by hand.

python scripts/size_configs.py configs/              every *.json of a folder
python scripts/size_configs.py configs.tar.gz        or of an archive

Prints a row for each file: bytes per token and bytes of the state, or the line of the refusal. Exits with 1 where an
answer differs from the one by hand, a refusal is longer than 199 characters or does not name its file, or anything but
an error of nanokv is raised. Reads no weights, and writes nothing that stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanokv.bench.size import measure
from nanokv.core.errors import NanokvError

LONGEST = 199
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def by_hand(config: dict[str, Any]) -> tuple[int, int]:
    """Bytes per token and bytes of the state of one sequence, from the raw JSON; uses nothing of nanokv."""
    top, config = config, config.get("text_config") or config
    stated = [part.get(name) for part in (config, top) for name in ("dtype", "torch_dtype")]
    width = BYTES[next(filter(None, stated))]
    layers = config["num_hidden_layers"]
    if "kv_lora_rank" in config:
        return latents(config, layers) * width, 0
    if "linear_num_value_heads" in config:
        interval = config.get("full_attention_interval", 4)
        types = config.get("layer_types") or [
            "linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(layers)
        ]
        attention = types.count("full_attention")
        return grouped_heads(config, attention) * width, delta_state(config, layers - attention, width)
    return grouped_heads(config, layers) * width, 0


def grouped_heads(config: dict[str, Any], layers: int) -> int:
    """Numbers per token with grouped-query attention: a key and a value of each KV head."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return layers * 2 * (config.get("num_key_value_heads") or heads) * head_dim


def latents(config: dict[str, Any], layers: int) -> int:
    """Numbers per token with multi-head latent attention: the latent and one rotated key."""
    return layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"])


def delta_state(config: dict[str, Any], layers: int, width: int) -> int:
    """Bytes of the states of Gated DeltaNet: a float32 matrix for each value head, the inputs of the convolution."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    matrices = values * config["linear_key_head_dim"] * 4
    return layers * (matrices + (2 * keys + values) * (config["linear_conv_kernel_dim"] - 1) * width)


def check(path: Path) -> tuple[list[str], str | None]:
    """The row of a file, and its fault or None."""
    try:
        layout = measure(str(path), "auto", "raw", 16).layout
    except NanokvError as error:
        line = str(error)
        fault = None
        if "\n" in line or len(line) > LONGEST:
            fault = f"refused with {len(line)} characters in {len(line.splitlines())} lines"
        elif not line.startswith(f"{path}: "):
            fault = "the refusal does not begin with the file's name"
        return [path.stem, "refused", line.removeprefix(f"{path}: ")], fault
    except Exception:
        return [path.stem, "raised", ""], traceback.format_exc()
    got, expected = (layout.bytes_per_token, layout.state_payload), by_hand(json.loads(path.read_text()))
    fault = None if got == expected else f"{got} by nanokv, {expected} by hand"
    return [path.stem, f"{got[0]:,}", f"{got[1]:,}"], fault


@contextmanager
def json_files(place: Path) -> Iterator[list[Path]]:
    """The *.json of a folder, or of an archive, unpacked for the time of the call."""
    if place.is_dir():
        yield sorted(place.glob("*.json"))
        return
    with tempfile.TemporaryDirectory() as folder, tarfile.open(place) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".json"):
                content = archive.extractfile(member)
                assert content is not None
                Path(folder, Path(member.name).name).write_bytes(content.read())
        yield sorted(Path(folder).glob("*.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, metavar="TAR_OR_FOLDER", help="config.json files under any names")
    with json_files(parser.parse_args().place) as paths:
        results = [check(path) for path in paths]
    for name, per_token, state in (
        ["config", "bytes/token", "state bytes, or the refusal"],
        *(row for row, _ in results),
    ):
        print(f"{name:60} {per_token:>12}  {state}")
    faults = [f"{row[0]}: {fault}" for row, fault in results if fault is not None]
    refused = sum(row[1] == "refused" for row, _ in results)
    print(f"{len(results)} configs: {len(results) - refused} sized, {refused} refused, {len(faults)} faults")
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(1 if faults or not results else 0)


if __name__ == "__main__":
    main()
