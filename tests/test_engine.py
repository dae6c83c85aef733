"""The engine end to end on a tiny random model: life cycle, faults, limits. test_exactness.py tests its numbers."""

import itertools
import json

import pytest
import torch
from helpers import run
from oracles import prompt

from nanokv import EngineConfig, SamplingParams
from nanokv.core.errors import ConfigError, NanokvError, RequestError
from nanokv.core.request import Request
from nanokv.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(tiny_llama):
    with LLM(tiny_llama, page_size=4, num_pages=64, max_step_tokens=16, debug_checks=True) as llm:
        yield llm


def assert_all_pages_back(llm: LLM) -> None:
    llm.engine.cache.check()
    stats = llm.stats()
    assert stats["pages_held"] == stats["pages_locked"] == 0
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]


def test_outputs_report_each_token_and_the_metrics_of_a_request(llm):
    request_id = llm.engine.add_request(Request(prompt(20), GREEDY, "r"))
    outputs = run(llm)
    assert request_id == "r"
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3, 4, 5, 6]
    assert [output.finish_reason for output in outputs] == [None] * 5 + ["length"]
    metrics = outputs[-1].metrics
    assert metrics.arrival <= metrics.first_scheduled <= metrics.token_times[0]
    assert len(metrics.token_times) == 6
    assert metrics.ttft <= metrics.latency and metrics.tpot > 0
    assert_all_pages_back(llm)


def test_a_repeated_prompt_is_cached_up_to_its_last_page(llm):
    first = llm.generate([prompt(20)], GREEDY)[0]
    second = llm.generate([prompt(20)], GREEDY)[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)  # 20 is a page boundary; one token must be computed
    assert first.token_ids == second.token_ids
    assert llm.stats()["hit_tokens"] == 16


def test_the_next_turn_hits_the_prompt_and_the_answer(llm):
    first = llm.generate([prompt(20)], GREEDY)[0]
    turn = [*prompt(20), *first.token_ids, *prompt(5, 9)]
    assert llm.generate([turn], GREEDY)[0].cached_tokens == 24  # 25 computed tokens are 6 full pages


def test_requests_with_different_salts_share_no_pages(llm):
    salted = SamplingParams(temperature=0, max_tokens=2, cache_salt="mine")
    llm.generate([prompt(20)], GREEDY)
    assert llm.generate([prompt(20)], salted)[0].cached_tokens == 0
    assert llm.generate([prompt(20)], salted)[0].cached_tokens == 16


def test_reset_prefix_cache_drops_all_cached_pages(llm):
    llm.generate([prompt(20)], GREEDY)
    llm.reset_prefix_cache()
    assert llm.stats()["pages_cached"] == 0
    assert llm.generate([prompt(20)], GREEDY)[0].cached_tokens == 0


@pytest.mark.parametrize("when", range(9))
def test_an_abort_at_any_step_frees_every_page(llm, when):
    llm.engine.add_request(Request(prompt(30), GREEDY, "doomed"))
    llm.engine.add_request(Request(prompt(30, 1), SamplingParams(n=2, max_tokens=4, seed=1, ignore_eos=True), "mate"))
    outputs = [output for _ in range(when) for output in llm.engine.step()]
    finished = "doomed" not in llm.engine
    if not finished:
        llm.engine.abort("doomed")
    outputs += run(llm)
    ends = sorted((output.request_id, output.finish_reason) for output in outputs if output.finished)
    assert ends == [("doomed", "length" if finished else "abort"), ("mate", "length"), ("mate", "length")]
    assert_all_pages_back(llm)


def test_an_abort_before_the_fork_ends_each_sample(llm):
    llm.engine.add_request(Request(prompt(30), SamplingParams(n=3), "group"))
    llm.engine.step()
    llm.engine.abort("group")
    assert [(o.index, o.finish_reason) for o in run(llm)] == [(0, "abort"), (1, "abort"), (2, "abort")]
    assert_all_pages_back(llm)


def test_aborting_an_unknown_request_is_an_error(llm):
    with pytest.raises(RequestError, match="nobody"):
        llm.engine.abort("nobody")


def test_samples_share_the_pages_of_the_prompt_and_copy_the_partial_page(llm):
    held = []
    llm.engine.add_request(Request(prompt(18), SamplingParams(n=4, max_tokens=5, seed=3, ignore_eos=True)))
    outputs = []
    while llm.engine.has_work:
        outputs.extend(llm.engine.step())
        llm.engine.cache.check()
        held.append(llm.stats()["pages_held"] + llm.stats()["pages_locked"])
    final = {output.index: output.token_ids for output in outputs if output.finished}
    assert sorted(final) == [0, 1, 2, 3]
    assert len(set(map(tuple, final.values()))) > 1
    # All share 4 full pages; 22 tokens are 6 pages: at most 4 + 4 x 2, where unshared samples would hold 24.
    assert max(held) <= 12
    assert llm.stats()["copies"] == 3  # the last holder of the partial page writes in place


def test_preemption_and_eviction_change_no_sample(llm, tiny_llama):
    params = SamplingParams(n=3, max_tokens=5, seed=3, ignore_eos=True)
    together = llm.generate([prompt(18)], params)
    assert [output.index for output in together] == [0, 1, 2]
    with LLM(tiny_llama, page_size=4, num_pages=8, max_step_tokens=7, max_requests=3) as small:
        again = small.generate([prompt(18)], params)
        assert small.stats()["preemptions"] + small.stats()["evictions"] > 0
    assert [output.token_ids for output in again] == [output.token_ids for output in together]


def test_max_tokens_beyond_max_model_len_ends_with_length(tiny_llama):
    with LLM(tiny_llama, num_pages=64, max_model_len=30) as llm:
        output = llm.generate([prompt(20)], SamplingParams(max_tokens=10**6, temperature=0, ignore_eos=True))[0]
        assert len(output.token_ids) == 10
        assert output.finish_reason == "length"


def test_an_answer_that_fills_the_pool_ends_with_length(tiny_llama):
    with LLM(tiny_llama, page_size=4, num_pages=6) as llm:
        output = llm.generate([prompt(20)], SamplingParams(max_tokens=100, temperature=0, ignore_eos=True))[0]
        assert output.finish_reason == "length"
        assert 20 + len(output.token_ids) == 25  # 24 tokens fit, the last one is never written


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request([]), "prompt_token_ids"),
        (Request([1, 256]), "unknown token id 256"),
        (Request([1, -1]), "unknown token id -1"),
        (Request([1, 2**40]), "prompt_token_ids"),
        (Request(["a"]), "prompt_token_ids"),
        (Request(None), "prompt_token_ids"),
        (Request([5] * 400), "400 tokens"),
        (Request([5], SamplingParams(max_tokens=0)), "max_tokens=0"),
        (Request([5], SamplingParams(temperature=-0.1)), "temperature=-0.1"),
        (Request([5], SamplingParams(temperature=float("nan"))), "temperature=nan"),
        (Request([5], SamplingParams(top_p=0.0)), "top_p=0.0"),
        (Request([5], SamplingParams(top_p=1.5)), "top_p=1.5"),
        (Request([5], SamplingParams(top_k=-1)), "top_k=-1"),
        (Request([5], SamplingParams(min_p=2)), "min_p=2"),
        (Request([5], SamplingParams(n=0)), "n=0"),
        (Request([5], SamplingParams(n=1000)), "n=1000"),
        (Request([5], SamplingParams(repetition_penalty=0)), "repetition_penalty=0"),
        (Request([5], SamplingParams(logprobs=-1)), "logprobs=-1"),
        (Request([5], SamplingParams(logprobs=300)), "logprobs=300"),
        (Request([5], SamplingParams(seed=-4)), "seed=-4"),
        (Request([5], SamplingParams(stop=("",))), "stop"),
        (Request([5], SamplingParams(stop=("x",))), "tokenizer"),
        (Request([5], SamplingParams(stop_token_ids=(999,))), "unknown token id 999"),
    ],
)
def test_an_invalid_request_is_refused_by_field_and_others_continue(llm, request_, field):
    llm.engine.add_request(Request(prompt(8), GREEDY, "good"))
    llm.engine.step()
    with pytest.raises(RequestError) as caught:
        llm.engine.add_request(request_)
    assert field in str(caught.value) and "\n" not in str(caught.value)
    assert run(llm)[-1].finish_reason == "length"


def test_a_live_request_id_is_refused_and_a_finished_one_may_be_reused(llm):
    llm.engine.add_request(Request(prompt(8), GREEDY, "same"))
    with pytest.raises(RequestError, match="same"):
        llm.engine.add_request(Request(prompt(8), GREEDY, "same"))
    assert len(run(llm)) == 6
    llm.engine.add_request(Request(prompt(8), GREEDY, "same"))
    assert len(run(llm)) == 6


def test_a_request_object_can_be_used_once(llm):
    request = Request(prompt(8), GREEDY)
    llm.engine.add_request(request)
    run(llm)
    with pytest.raises(RequestError, match="used before"):
        llm.engine.add_request(request)


@pytest.mark.parametrize("step_that_fails", [1, 2, 4])
@pytest.mark.parametrize("place", ["run", "sample", "plan"])
def test_an_exception_in_a_step_ends_its_requests_and_the_engine_continues(llm, monkeypatch, step_that_fails, place):
    owner, name = {
        "run": (llm.engine.runner, "run"),
        "sample": (llm.engine, "_sample"),
        "plan": (llm.engine.scheduler, "plan"),
    }[place]
    original, calls = getattr(owner, name), itertools.count(1)

    def fails(*arguments):
        if next(calls) == step_that_fails:
            raise ValueError("a bug")
        return original(*arguments)

    monkeypatch.setattr(owner, name, fails)
    llm.engine.add_request(Request(prompt(20), SamplingParams(n=2, seed=1, max_tokens=6, ignore_eos=True), "a"))
    llm.engine.add_request(Request(prompt(20, 1), GREEDY, "b"))
    outputs = run(llm)
    final = [output for output in outputs if output.finished]
    assert {output.request_id for output in final} == {"a", "b"}
    failed = [output for output in final if output.finish_reason == "error"]
    assert all("ValueError: a bug" in output.error for output in failed)
    if step_that_fails > 1 or place != "plan":
        assert failed
    assert_all_pages_back(llm)
    monkeypatch.undo()
    assert llm.generate([prompt(20, 1)], GREEDY)[0].finish_reason == "length"


def test_an_interrupt_in_a_step_loses_no_token(llm, monkeypatch):
    expected = llm.generate([prompt(20)], GREEDY)[0].token_ids
    original, calls = llm.engine.runner.run, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    llm.engine.add_request(Request(prompt(20), GREEDY, "r"))
    with pytest.raises(KeyboardInterrupt):
        run(llm)
    llm.engine.cache.check()
    assert run(llm)[-1].token_ids == expected


def test_an_exception_during_admission_ends_only_that_request(llm, monkeypatch):
    def fails(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(llm.engine.cache, "reserve", fails)
    llm.engine.add_request(Request(prompt(20), GREEDY, "unlucky"))
    assert [(o.request_id, o.finish_reason) for o in run(llm, 2)] == [("unlucky", "error")]
    monkeypatch.undo()
    assert_all_pages_back(llm)
    assert llm.generate([prompt(20)], GREEDY)[0].finish_reason == "length"


def test_nonfinite_logits_end_only_their_own_request(llm, monkeypatch):
    original = llm.engine.runner.run

    def poisoned(*arguments):
        logits, last, refused = original(*arguments)
        logits = logits.clone()
        if len(logits) == 2:
            logits[1] = float("nan")
        return logits, last, refused

    monkeypatch.setattr(llm.engine.runner, "run", poisoned)
    llm.engine.add_request(Request(prompt(5), GREEDY, "well"))
    llm.engine.add_request(Request(prompt(5, 1), SamplingParams(seed=1), "ill"))
    final = {output.request_id: output for output in run(llm) if output.finished}
    assert final["well"].finish_reason == "length"
    assert final["ill"].finish_reason == "error" and "not finite" in final["ill"].error


@pytest.mark.parametrize("samples", [1, 2])
def test_a_step_with_nonfinite_logits_publishes_no_pages(llm, monkeypatch, samples):
    original = llm.engine.runner.run

    def poisoned(*arguments):
        logits, last, refused = original(*arguments)
        return torch.full_like(logits, float("nan")), last, refused

    monkeypatch.setattr(llm.engine.runner, "run", poisoned)
    llm.engine.add_request(Request(prompt(14), SamplingParams(n=samples)))
    outputs = run(llm)
    assert [(output.index, output.finish_reason) for output in outputs] == [(i, "error") for i in range(samples)]
    assert llm.stats()["pages_cached"] == llm.stats()["pages_held"] == 0


@pytest.mark.parametrize("params", [{"min_tokens": 4}, {"repetition_penalty": 1.3}, {"temperature": 1e-46}])
def test_sampling_parameters_that_change_logits_work_in_the_engine(llm, params):
    chosen = SamplingParams(**{"max_tokens": 6, "temperature": 0, **params})
    output = llm.generate([prompt(12)], chosen)[0]
    assert output.finish_reason in ("stop", "length")
    assert len(output.token_ids) > params.get("min_tokens", 0)


def test_a_scored_text_must_fit_in_the_pool(tiny_llama):
    with LLM(tiny_llama, page_size=4, num_pages=16) as llm:
        assert llm.score(prompt(64)).shape[0] == 64
        with pytest.raises(RequestError, match="at most 64"):
            llm.score(prompt(65))


def test_a_preempted_scoring_request_delivers_each_row_once(llm):
    expected = llm.score(prompt(40))
    blocks = llm.score_blocks(prompt(40))
    rows = [next(blocks)]
    llm.engine.scheduler.preempt(llm.engine.scheduler.running[0])
    rows.extend(blocks)
    assert torch.equal(torch.cat(rows), expected)


def test_an_aborted_scoring_request_raises_an_error(llm):
    blocks = llm.score_blocks(prompt(40))
    next(blocks)
    llm.engine.abort(llm.engine.scheduler.running[0].request_id)
    with pytest.raises(NanokvError, match="abort"):
        list(blocks)


def test_a_stream_keeps_the_outputs_of_requests_added_to_the_engine(llm):
    llm.engine.add_request(Request(prompt(12), GREEDY, "own"))
    stream = llm.stream(prompt(12, 1), GREEDY)
    assert len(list(stream)) == 6
    own = [output for output in run(llm) if output.request_id == "own"]
    assert [len(output.token_ids) for output in own] == [1, 2, 3, 4, 5, 6]


def test_a_stream_gets_its_outputs_when_the_engine_is_stepped_directly(llm):
    stream = llm.stream(prompt(12), GREEDY)
    assert run(llm) == []
    assert [len(output.token_ids) for output in stream] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_ends_only_the_event_log(tiny_llama, tmp_path, monkeypatch):
    with LLM(tiny_llama, page_size=4, num_pages=64, event_log=str(tmp_path / "events.jsonl")) as llm:

        class Full:
            def write(self, text):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(llm.engine._log, "_file", Full())
        assert llm.generate([prompt(20)], GREEDY)[0].finish_reason == "length"
        assert not llm.engine.events
        monkeypatch.undo()
        assert_all_pages_back(llm)


def test_a_stop_token_ends_the_answer_and_is_part_of_it(llm):
    free = llm.generate([prompt(12)], GREEDY)[0].token_ids
    third = free[2]
    first = free.index(third)
    stopped = llm.generate([prompt(12)], SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(third,)))[0]
    assert stopped.token_ids == free[: first + 1]
    assert stopped.finish_reason == "stop"


def test_each_token_has_its_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True)
    output = llm.generate([prompt(12)], params)[0]
    assert len(output.logprobs) == 4
    for token, report in zip(output.token_ids, output.logprobs, strict=True):
        assert len(report) == 3 and report[token] == max(report.values())


def test_the_event_log_records_the_events_in_time_order(tiny_llama, tmp_path):
    path = tmp_path / "events.jsonl"
    with LLM(tiny_llama, page_size=4, num_pages=12, max_step_tokens=16, event_log=str(path)) as llm:
        llm.generate([prompt(20), prompt(20, 1), prompt(20)], GREEDY)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    names = {record["event"] for record in records}
    assert {"open", "request", "match", "alloc", "publish", "step", "finish"} <= names
    assert [record["t"] for record in records] == sorted(record["t"] for record in records)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"codec": "zip"}, "codec='zip'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"kv_memory": "10"}, "one page"),
        ({"num_pages": 10**9}, "are free"),
        ({"no_such": 1}, "no_such"),
        ({"max_model_len": 513}, "max_model_len=513"),
        ({"event_log": "/no/such/folder/x"}, "event_log="),
        ({"event_log": 3}, "event_log=3"),
    ],
)
def test_the_error_names_an_invalid_option(tiny_llama, fields, words):
    with pytest.raises(ConfigError) as caught:
        LLM(tiny_llama, **fields)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_together_with_fields_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="not both"):
        LLM(tiny_llama, EngineConfig(), page_size=4)
