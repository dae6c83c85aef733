"""The soaks and the fuzzer of templates in scripts/, for a moment: each finds a fault that is there."""

import logging
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nanokv import LLM, SamplingParams

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import fuzz_templates  # noqa: E402
import soak  # noqa: E402
from soaks.common import Alone, Holdings, Record  # noqa: E402


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
    assert "violations 0" in ran("threads", "--seconds", "2")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-gqa", "tiny-mla", "tiny-hybrid"])
def test_a_soak_with_faults_and_interrupts_finds_nothing(model):
    assert "violations 0" in ran("engine", "--model", model, "--seconds", "20", "--seed", "1")


@pytest.mark.slow
def test_ctrl_c_at_random_moments_of_generate_leaves_nothing_behind():
    assert "violations 0" in ran("ctrl-c", "--seconds", "20")


def test_a_soak_sees_every_kind_of_wrong_answer(tiny_llama):
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=1)
    with LLM(tiny_llama, num_pages=16, prefix_cache=False) as llm:
        alone, prompt = Alone(llm), [5, 6, 7]
        (right,) = llm.generate([prompt], params)
        tokens = right.token_ids
        assert alone.difference(prompt, params, right) is None
        cut = replace(right, token_ids=tokens[:2], finish_reason="abort")
        assert alone.difference(prompt, params, cut) is None
        for change in (
            {"token_ids": [*tokens[:-1], tokens[-1] + 1]}, {"token_ids": tokens[:-1]}, {"finish_reason": "stop"},
            {"finish_reason": "error"}, {"logprobs": None},
            {"token_ids": [tokens[0], tokens[1] + 1], "finish_reason": "abort"},
        ):  # fmt: skip
            assert alone.difference(prompt, params, replace(right, **change)) is not None, change


def test_a_violation_and_a_descriptor_that_stays_open_are_found(capsys):
    record, holdings = Record(), Holdings()
    assert record.exit_code == 0 and not [leak for leak in holdings.leaks() if "descriptors" in leak]
    reading, writing = os.pipe()
    try:
        (leak,) = [leak for leak in holdings.leaks() if "descriptors" in leak]
    finally:
        os.close(reading)
        os.close(writing)
    record.violation(leak)
    assert record.exit_code == 1 and "descriptors, " in capsys.readouterr().out


@pytest.mark.slow
def test_a_short_soak_of_disagg_finds_nothing():
    command = [sys.executable, str(SCRIPTS / "soak.py"), "disagg", "--seconds", "20", "--seed", "2"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0 and "violations 0" in ended.stdout, ended.stdout + ended.stderr


def test_random_templates_render_or_are_refused_in_one_line():
    faults = [fuzz_templates.fault(fuzz_templates.template(random.Random(f"0/{number}"))) for number in range(40)]
    assert {outcome for outcome, _ in faults} == {"rendered", "refused"}
    assert [wrong for _, wrong in faults if wrong is not None and "CPU" not in wrong] == []


def test_the_fuzzer_of_templates_finds_an_exception_that_is_none_of_ours(monkeypatch):
    monkeypatch.setattr(fuzz_templates.ChatTemplate, "render", lambda *_: 1 / 0)
    assert fuzz_templates.fault("{{ 1 }}")[1] == "ZeroDivisionError: division by zero"
