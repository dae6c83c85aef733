"""Scoring: log-probabilities of a prompt, computed before it is answered."""

import oracles
import pytest
import torch
from oracles import prompt

from nanokv import LLM, SamplingParams
from nanokv.core.errors import RequestError
from nanokv.core.request import Request
from nanokv.engine import scheduler

SCORED = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=3, logprobs=1)


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama, num_pages=64, page_size=4) as llm:
        yield llm


@pytest.mark.parametrize("length", [1, 2, 9, 33])
def test_prompt_logprobs_are_those_of_transformers(llm, tiny_llama, length, monkeypatch):
    monkeypatch.setattr(scheduler, "SCORE_ROWS", 8)  # several blocks
    output = llm.generate([prompt(length)], SCORED)[0]
    expected = oracles.logits(oracles.reference(tiny_llama), prompt(length)).log_softmax(-1)
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == length
    for place, report in enumerate(output.prompt_logprobs[1:]):
        row, said = expected[place], prompt(length)[place + 1]
        best = row.topk(3)
        assert report == pytest.approx(
            {said: float(row[said]), **dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))}, abs=1e-4
        )


def test_a_scored_prompt_is_computed_once_and_answered_as_any_other(llm):
    llm.reset_prefix_cache()
    plain = llm.generate([prompt(24, 1)], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=1))[0]
    llm.reset_prefix_cache()
    scored = llm.generate([prompt(24, 1)], SCORED)[0]
    assert (scored.token_ids, scored.logprobs) == (plain.token_ids, plain.logprobs)
    assert scored.cached_tokens == 0 and plain.prompt_logprobs is None  # its own scoring is no hit
    steps = llm.stats()["steps"]
    llm.reset_prefix_cache()
    llm.generate([prompt(24, 1)], SCORED)
    assert llm.stats()["steps"] - steps <= 1 + 5  # the answer finds the pages of the scoring


def test_a_prompt_that_is_cached_has_the_same_prompt_logprobs(llm):
    llm.reset_prefix_cache()
    first, second = (llm.generate([prompt(24, 2)], SCORED)[0] for _ in range(2))
    assert first.prompt_logprobs == second.prompt_logprobs


def test_every_sample_and_every_output_of_a_stream_has_the_prompt_logprobs(llm):
    params = SamplingParams(max_tokens=3, n=2, prompt_logprobs=0, ignore_eos=True)
    outputs = [*llm.generate([prompt(7)], params), *llm.stream(prompt(7), params)]
    for output in outputs:
        assert [list(report) for report in output.prompt_logprobs[1:]] == [[token] for token in prompt(7)[1:]]


def test_prompts_of_other_tenants_are_not_scored_into_the_common_cache(llm):
    llm.reset_prefix_cache()
    llm.generate([prompt(24, 3)], SamplingParams(max_tokens=1, prompt_logprobs=1, cache_salt="tenant"))
    assert llm.generate([prompt(24, 3)], SamplingParams(max_tokens=1))[0].cached_tokens == 0


@pytest.mark.parametrize("count", [-1, 1.5, True, 10**6])
def test_a_wrong_number_of_prompt_logprobs_is_refused_before_a_step(llm, count):
    steps = llm.stats()["steps"]
    with pytest.raises(RequestError, match="prompt_logprobs="):
        llm.generate([prompt(9)], SamplingParams(prompt_logprobs=count))
    assert llm.stats()["steps"] == steps


def test_an_engine_alone_refuses_prompt_logprobs(llm):
    with pytest.raises(RequestError, match="give the prompt to LLM"):
        llm.engine.add_request(Request(prompt(5), SCORED))


def test_scores_of_a_text_are_those_of_its_token_ids():
    with LLM("tiny-gqa", num_pages=16) as llm:
        text = "There is a red ball."
        assert torch.equal(llm.score(text), llm.score(llm.tokenizer.encode(text, add_special=True)))
