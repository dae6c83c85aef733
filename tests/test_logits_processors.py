"""Functions of a user that change the logits: what they are given, what they may do, and what their faults end."""

import re
from types import SimpleNamespace

import pytest
import torch
from oracles import prompt

from nanokv import LLM, SamplingParams
from nanokv.core.errors import RequestError
from nanokv.core.request import Request
from nanokv.disagg.config import DisaggConfig
from nanokv.disagg.dispatcher import Dispatcher
from nanokv.engine import engine as engine_module
from nanokv.engine.device_sampler import sample_on_device

FREE = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama, num_pages=64, page_size=4) as llm:
        yield llm


def favour_sums(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Depends on every token so far, and on their order."""
    factors = torch.arange(1, len(token_ids) + 1)
    chosen = int((torch.tensor(token_ids) * factors).sum()) % len(logits)
    return logits + 6 * torch.nn.functional.one_hot(torch.tensor(chosen), len(logits))


def allow(*token_ids: int):
    def processor(_so_far: list[int], logits: torch.Tensor) -> None:
        kept = logits[list(token_ids)].clone()
        logits.fill_(-torch.inf)
        logits[list(token_ids)] = kept

    return processor


@pytest.mark.parametrize("overlap", [False, True])
def test_a_processor_sees_the_prompt_and_the_answer_so_far(tiny_llama, overlap):
    seen: list[list[int]] = []
    with LLM(tiny_llama, num_pages=64, overlap=overlap) as llm:
        params = SamplingParams(**FREE, temperature=0, logits_processor=lambda ids, _logits: seen.append(ids))
        output = llm.generate([prompt(9)], params)[0]
        assert output.token_ids == llm.generate([prompt(9)], SamplingParams(**FREE, temperature=0))[0].token_ids
    assert seen[:12] == [prompt(9) + output.token_ids[:count] for count in range(12)]
    assert len(seen) <= 13  # with overlap, one step may run beyond the end


def test_a_processor_may_change_the_logits_in_place_or_return_them(llm):
    def forbid(ids: list[int], logits: torch.Tensor) -> None:
        logits[ids] = -torch.inf

    def forbidden(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor(ids), -torch.inf)

    answers = [
        llm.generate([prompt(8)], SamplingParams(**FREE, temperature=0, logits_processor=one))[0].token_ids
        for one in (forbid, forbidden)
    ]
    assert answers[0] == answers[1] and len(set(prompt(8) + answers[0])) == len(set(prompt(8))) + 12


def test_several_processors_run_in_turn(llm):
    params = SamplingParams(**FREE, logits_processor=[allow(3, 5, 7), lambda ids, logits: logits.roll(1)])
    assert set(llm.generate([prompt(5)], params)[0].token_ids) <= {4, 6, 8}


def test_logprobs_are_those_of_the_model_before_processors(llm):
    plain = llm.generate([prompt(8)], SamplingParams(max_tokens=1, logprobs=3, temperature=0))[0]
    held = llm.generate([prompt(8)], SamplingParams(max_tokens=1, logprobs=3, logits_processor=allow(9)))[0]
    best = plain.logprobs[0].items()
    assert held.token_ids == [9] and [item for item in held.logprobs[0].items() if item in best] == list(best)[:3]


@pytest.mark.parametrize("changed", [{"num_pages": 22, "page_size": 2}, {"overlap": True}, {"max_step_tokens": 5}])
def test_preemption_overlap_and_chunks_change_no_processed_answer(llm, tiny_llama, changed):
    params = [SamplingParams(**FREE, seed=seed, n=2, logits_processor=favour_sums) for seed in (None, 4, 5)]
    texts = [prompt(10, seed) for seed in range(3)]

    with LLM(tiny_llama, **{"num_pages": 64, "page_size": 4, **changed}) as other:
        outputs = other.generate(texts, params)
        assert ("num_pages" not in changed) or other.stats()["preemptions"] > 0
    expected = llm.generate(texts[1:], params[1:])
    assert [output.token_ids for output in outputs[2:]] == [output.token_ids for output in expected]
    plain = llm.generate(texts[1:], [SamplingParams(**FREE, seed=seed, n=2) for seed in (4, 5)])
    assert [output.token_ids for output in plain] != [output.token_ids for output in expected]


def test_the_device_sampler_runs_processors(tiny_llama, llm, monkeypatch):
    params = SamplingParams(**FREE, seed=3, n=2, logits_processor=favour_sums)
    expected = [output.token_ids for output in llm.generate([prompt(9)], params)]
    monkeypatch.setattr(engine_module, "sample", sample_on_device)
    with LLM(tiny_llama, num_pages=64) as other:
        assert [output.token_ids for output in other.generate([prompt(9)], params)] == expected


def broken(_ids: list[int], _logits: torch.Tensor) -> None:
    raise KeyError("no such state")


FAULTS = [
    (broken, "KeyError: 'no such state'"),
    (lambda ids, logits: logits.fill_(-torch.inf), "it forbids every token"),
    (lambda ids, logits: logits * torch.nan, "not finite"),
    (lambda ids, logits: logits[:5], r"returned shape \[5\]"),
    (lambda ids, logits: 5, "returned int; expected a tensor"),
]


@pytest.mark.parametrize(("processor", "why"), FAULTS)
@pytest.mark.parametrize("n", [1, 2])
def test_a_fault_of_a_processor_ends_its_request_alone(llm, processor, why, n):
    late = [lambda ids, logits: processor(ids, logits) if len(ids) > 10 else None]
    params = SamplingParams(**FREE, temperature=0, logits_processor=late, n=n)
    others = SamplingParams(**FREE, temperature=0)
    expected = llm.generate([prompt(8, 1)], others)[0].token_ids
    *broken_ones, good = llm.generate([prompt(8), prompt(8, 1)], [params, others])
    assert good.token_ids == expected and good.finish_reason == "length"
    assert [len(output.token_ids) for output in broken_ones] == [3] * n
    for output in broken_ones:
        assert output.finish_reason == "error" and output.error.startswith("logits_processor: ")
        assert re.search(why, output.error) and "\n" not in output.error
    at_once = SamplingParams(**FREE, logits_processor=processor, n=n)
    for output in llm.generate([prompt(8)], at_once):
        assert output.error.startswith("logits_processor: ") and output.token_ids == []
    llm.engine.cache.check()


def test_a_call_of_the_llm_inside_a_processor_is_its_fault(llm):
    params = SamplingParams(logits_processor=lambda ids, logits: llm.generate([prompt(3)]))
    assert "cannot be called from inside a step" in llm.generate([prompt(4)], params)[0].error


@pytest.mark.parametrize("value", [3, "x", [3], (broken, None)])
def test_what_cannot_be_called_is_no_processor(llm, value):
    with pytest.raises(RequestError, match="logits_processor=.*expected a tuple of Callable"):
        llm.generate([prompt(4)], SamplingParams(logits_processor=value))


def test_a_request_with_a_processor_is_computed_here():
    """A prefill process samples the first token, and has no functions of this one."""
    dispatcher = Dispatcher(DisaggConfig(min_tokens=4))
    dispatcher.workers = SimpleNamespace(ready=["a worker"])
    plain, processed = (Request(prompt(9), SamplingParams(logits_processor=one)) for one in ((), broken))
    for request in (plain, processed):
        request.tokens.extend(prompt(9))
    assert dispatcher.offers(plain, 0) == 9 and dispatcher.offers(processed, 0) == 0


def test_a_choice_among_texts_can_be_forced(llm):
    """The example of the README: one of a few answers, and nothing else."""
    choices, start = [[4, 8, 15], [4, 16], [23]], len(prompt(6))

    def choose(token_ids: list[int], logits: torch.Tensor) -> None:
        said = token_ids[start:]
        following = [one[len(said)] for one in choices if one[: len(said)] == said and len(one) > len(said)]
        allow(*(following or [2]))(token_ids, logits)

    params = SamplingParams(max_tokens=8, temperature=2.0, n=30, stop_token_ids=[2], logits_processor=choose)
    said = [output.token_ids for output in llm.generate([prompt(6)], params)]
    assert {tuple(ids[:-1]) for ids in said} == {(4, 8, 15), (4, 16), (23,)} and all(ids[-1] == 2 for ids in said)
