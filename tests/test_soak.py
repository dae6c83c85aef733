"""The soaks in scripts/: they can run, they see a wrong answer and a leak, and they end with 1."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanokv import LLM, SamplingParams

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from soaks.common import Alone, Holdings, Record  # noqa: E402


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
    command = [sys.executable, str(SCRIPTS / "soak_disagg.py"), "--seconds", "20", "--seed", "2"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0 and "violations 0" in ended.stdout, ended.stdout + ended.stderr
