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
    assert "violations 0" in ran("threads", "--seconds", "3")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-gqa", "tiny-mla", "tiny-hybrid"])
def test_a_soak_with_faults_and_interrupts_finds_nothing(model):
    assert "violations 0" in ran("engine", "--model", model, "--seconds", "20", "--seed", "1")


@pytest.mark.slow
def test_ctrl_c_at_random_moments_of_generate_leaves_nothing_behind():
    assert "violations 0" in ran("ctrl-c", "--seconds", "20")
