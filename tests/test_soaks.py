"""The soaks of scripts/soak.py, for a moment each; the long runs are commands."""

import logging
import signal
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import soak
from soaks.tally import Tally


@pytest.fixture(autouse=True)
def settings_of_the_process():
    interval, alarm = sys.getswitchinterval(), signal.getsignal(signal.SIGALRM)
    threads, level = torch.get_num_threads(), logging.getLogger("nanokv").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("nanokv").setLevel(level)
    sys.setswitchinterval(interval)
    signal.signal(signal.SIGALRM, alarm)


def ran(*arguments: str) -> str:
    result = CliRunner().invoke(soak.main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_method_is_safe_from_threads_that_change_every_10_us():
    assert " 0 violations" in ran("threads", "--seconds", "3")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-gqa", "tiny-mla", "tiny-hybrid"])
def test_a_soak_with_faults_and_interrupts_finds_nothing(model):
    assert " 0 violations" in ran("engine", "--model", model, "--seconds", "20", "--seed", "1")


@pytest.mark.slow
def test_ctrl_c_at_random_moments_of_generate_leaves_nothing_behind():
    assert " 0 violations" in ran("ctrl-c", "--seconds", "20")


def test_a_soak_that_finds_a_violation_says_so_and_fails(capsys):
    tally = Tally(0)
    tally.violation("a page is lost")
    with pytest.raises(SystemExit, match="1"):
        tally.report()
    assert "VIOLATION a page is lost" in capsys.readouterr().out
