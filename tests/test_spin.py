"""The spin of OpenMP threads is bounded before torch is imported, unless the user has chosen."""

import subprocess
import sys

import pytest

from nanokv.core.spin import CHOICES, SPINS, bound_spins, bounded


def test_a_bound_is_set_unless_the_user_has_chosen(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment: dict[str, str] = {}
    bound_spins(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPINS)}
    for name in CHOICES:
        chosen = {name: "passive"}
        bound_spins(chosen)
        assert chosen == {name: "passive"}


def test_torch_that_is_imported_already_keeps_its_threads(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    environment: dict[str, str] = {}
    bound_spins(environment)
    assert environment == {}


def test_a_process_to_start_gets_a_bound_unless_the_user_has_chosen():
    assert bounded({"HOME": "/"}) == {"HOME": "/", "GOMP_SPINCOUNT": str(SPINS)}
    assert bounded({"OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active"}


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
@pytest.mark.parametrize(
    ("first", "chosen", "warned"),
    [("torch", {}, 1), ("nanokv.cli.main, torch", {}, 0), ("torch", {"OMP_WAIT_POLICY": "passive"}, 0)],
)
def test_a_program_that_imports_torch_first_is_told_once_what_to_set(first, chosen, warned):
    program = f"import {first}; from nanokv.core.spin import warn_of_spins; warn_of_spins(); warn_of_spins()"
    environment = {"PATH": "", "PYTHONPATH": ":".join(path for path in sys.path if path), **chosen}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == done.stderr.count("GOMP_SPINCOUNT=10000") == warned


@pytest.mark.parametrize(
    "statement", ["import nanokv.cli.main", "from nanokv import LLM", "from nanokv import AsyncLLM"]
)
def test_the_command_line_and_the_library_bound_it_before_torch(statement):
    program = f"{statement}; import os; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {"PATH": "", "PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(SPINS), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="prefill processes need Linux")
def test_a_prefill_process_is_started_with_a_bound(monkeypatch):
    from nanokv.disagg import process

    class Started(Exception):
        pass

    def start(*arguments, env, **options):
        raise Started(env["GOMP_SPINCOUNT"])

    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process.subprocess, "Popen", start)
    with pytest.raises(Started, match=str(SPINS)):
        process.LocalWorker(process.WorkerSpec(name="one", folder=".", device="cpu", dtype="float32", config={}))
