"""The spin of OpenMP threads is bounded before torch is imported, unless the user has chosen."""

import subprocess
import sys

import pytest

from nanokv.core.spin import CHOICES, SPINS, bound_spins


def test_a_bound_is_set_unless_the_user_has_chosen(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment: dict[str, str] = {}
    bound_spins(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPINS)}
    for name in CHOICES:
        chosen = {name: "passive"}
        bound_spins(chosen)
        assert chosen == {name: "passive"}


def test_torch_that_is_imported_already_keeps_its_threads_and_the_log_says_what_would_help(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch", object())
    environment: dict[str, str] = {}
    with caplog.at_level("INFO", "nanokv"):
        bound_spins(environment)
    assert environment == {} and "GOMP_SPINCOUNT" in caplog.text


@pytest.mark.parametrize(
    "statement", ["import nanokv.cli.main", "from nanokv import LLM", "from nanokv import AsyncLLM"]
)
def test_the_command_line_and_the_library_bound_it_before_torch(statement):
    program = f"{statement}; import os; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {"PATH": "", "PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(SPINS), done.stderr
