"""scripts/fuzz_checkpoints.py: hostile folders load or are refused in one line, and a broken bound is found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from hostile import cases, models, mutants, worker  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes and timers of POSIX"),
]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The valid folders by name, never written to by the tests."""
    return {folder.name: folder for folder in models.seeds(tmp_path_factory.mktemp("valid"))}


def judged(folder, change, tmp_path):
    work = shutil.copytree(folder, tmp_path / "work", symlinks=True)
    change(work)
    verdict = worker.judge(work, seconds=30, wait=60)
    shutil.rmtree(work)
    return verdict


@pytest.mark.parametrize("name", ["llama", "shards", "fp8", "nvfp4", "experts", "latent"])
def test_every_valid_folder_loads(valid, tmp_path, name):
    assert judged(valid[name], lambda folder: None, tmp_path).kind == "loads"


CASES = cases.all_cases()
QUICK = [name for name in CASES if not name.endswith(("40MB", "90MB", "more", "lacking")) and "-deep" not in name]


@pytest.mark.parametrize("part", range(4))
def test_hostile_folders_load_or_are_refused_in_one_line(valid, tmp_path, part):
    """Every second listed case; the script runs all of them."""
    for name in QUICK[2 * part :: 8]:
        model, change = CASES[name]
        verdict = judged(valid[model], change, tmp_path)
        assert verdict.ok, (name, verdict)


def test_mutants_of_valid_folders_load_or_are_refused_in_one_line(valid, tmp_path):
    kinds = set()
    for number in range(120):
        folder = list(valid.values())[number % len(valid)]
        verdict = judged(folder, lambda work, number=number: mutants.mutate(work, f"test/{number}"), tmp_path)
        assert verdict.ok, (number, verdict)
        kinds.add(verdict.kind)
    assert kinds == {"loads", "refused"}


def test_a_mutant_follows_from_its_seed(valid, tmp_path):
    found = []
    for number, name in enumerate(("one", "two", "other")):
        folder = shutil.copytree(valid["experts"], tmp_path / name)
        mutants.mutate(folder, f"seed/{number // 2}")
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("fault", "kind", "wait"),
    [
        ("raise ValueError('x')", "leaks ValueError", 60),
        ("import time; time.sleep(600)", "hangs", 1),
        ("x = sum(i for i in range(10**7)); raise CheckpointError('slow')", "takes long", 60),
        ("raise CheckpointError('two\\nlines')", "not one short line", 60),
    ],
)
def test_a_loader_that_breaks_a_bound_is_found(valid, monkeypatch, fault, kind, wait):
    source = f"from nanokv.core.errors import CheckpointError\ndef read_folder(folder):\n    {fault}\n"
    space = {}
    exec(source, space)
    monkeypatch.setattr("nanokv.open_model.read_folder", space["read_folder"])
    verdict = worker.judge(valid["llama"], seconds=0.05 if kind == "takes long" else 30, wait=wait)
    assert not verdict.ok and verdict.kind == kind


@pytest.mark.slow
def test_a_process_that_dies_is_replaced(valid):
    process = worker.Worker(valid["llama"], seconds=30, mib=1024)
    assert process.judge(valid["fp8"]).kind == "loads"
    process._process.kill()
    process._process.wait()
    assert process.judge(valid["fp8"]).kind == "loads"
    process.close()


@pytest.mark.slow
def test_the_command_runs_every_listed_case():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/fuzz_checkpoints.py", "--mutants", "200"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "refused" in done.stdout.splitlines()[-1], done.stdout + done.stderr
