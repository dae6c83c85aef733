"""Overlap: a step is planned while the previous one runs, and the tokens are the same as without overlap."""

import itertools

import oracles
import pytest
import torch
from fake_terminal import ScriptedLLM
from helpers import run, with_logprobs

from nanokv import EngineConfig, SamplingParams
from nanokv.core.request import Request
from nanokv.engine import step as stepping
from nanokv.llm import LLM

ROOM = {"num_states": 40}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LENGTHS = (1, 3, 16, 17, 33, 64, 130)


def prompts() -> list[list[int]]:
    return oracles.prompts(LENGTHS)


PARAMS = [
    SamplingParams(
        max_tokens=2 + i, temperature=0.0 if i % 2 else 1.0, seed=i, logprobs=0, n=3 if i == 4 else 1,
        repetition_penalty=1.2 if i in (5, 6) else 1.0, top_p=0.9 if i == 8 else 1.0, min_tokens=3 if i == 3 else 0,
        ignore_eos=i % 3 > 0,
    )
    for i in range(len(prompts()))
]  # fmt: skip


def answers(llm: LLM) -> list[tuple]:
    """Tokens, log-probabilities and ends."""
    outputs = llm.generate(prompts(), PARAMS)
    return [*zip(with_logprobs(outputs), (output.finish_reason for output in outputs), strict=True)]


def assert_all_back(llm: LLM) -> None:
    llm.engine.cache.check()
    assert llm.stats()["pages_held"] == llm.stats()["pages_locked"] == llm.stats().get("states_held", 0) == 0


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "deepseek_v3", "qwen3_5"])
def model(request, tmp_path_factory):
    """A family's folder, and its answers without overlap."""
    folder = oracles.checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    with LLM(folder, num_pages=256, overlap=False, **ROOM) as llm:
        return folder, answers(llm)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"num_pages": 128},
        {"num_pages": 400, "page_size": 4, "max_step_tokens": 23},
        {"num_pages": 42, "page_size": 4, "max_requests": 4},
        {"num_pages": 128, "prefix_cache": False, "max_step_tokens": 50},
    ],
    ids=["plain", "chunks", "few pages", "no prefix cache"],
)
def test_overlap_and_padding_change_no_bit(model, config, graphs):
    folder, expected = model
    with LLM(folder, overlap=True, graphs=graphs, **config, **ROOM) as llm:
        assert answers(llm) == expected
        assert answers(llm) == expected  # now with cache hits, if the pool has room for them
        if config["num_pages"] > 100:
            assert (llm.stats()["hit_tokens"] > 0) == config.get("prefix_cache", True)
        assert_all_back(llm)


@pytest.mark.parametrize("graphs", [False, True])
def test_preemption_with_an_in_flight_token_changes_no_token(model, graphs):
    folder, _ = model
    texts = [oracles.prompt(length, seed=length) for length in (3, 5, 9, 17)]
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    with LLM(folder, num_pages=64, max_requests=1, **ROOM) as llm:
        alone = [output.token_ids for output in llm.generate(texts, params)]
    with LLM(folder, page_size=4, num_pages=14, max_step_tokens=32, overlap=True, graphs=graphs, **ROOM) as llm:
        assert [output.token_ids for output in llm.generate(texts, params)] == alone
        assert llm.stats()["preemptions"] > 0
        assert_all_back(llm)


def test_overlap_does_not_change_the_number_of_cached_tokens(model):
    folder, _ = model
    counters = []
    for overlap in (False, True):
        with LLM(folder, page_size=4, num_pages=300, overlap=overlap, **ROOM) as llm:
            first = llm.generate(oracles.prompt(45, seed=1), GREEDY)[0]
            turn = [*oracles.prompt(45, seed=1), *first.token_ids, 7, 8]
            second = llm.generate(turn, GREEDY)[0]
            again = llm.generate(oracles.prompt(45, seed=1), GREEDY)[0]
            counters.append([output.cached_tokens for output in (first, second, again)])
    assert counters[0] == counters[1] and counters[1][1] >= 48


@pytest.fixture
def llm(tiny_llama):
    with LLM(tiny_llama, page_size=4, num_pages=64, max_step_tokens=16, debug_checks=True, overlap=True) as llm:
        yield llm


def test_the_next_step_is_launched_before_the_last_one_is_read(llm, monkeypatch):
    order = []
    for name in ("launch", "resolve"):
        original = getattr(stepping, name)
        monkeypatch.setattr(
            f"nanokv.engine.engine.{name}", lambda *a, name=name, original=original: order.append(name) or original(*a)
        )
    llm.engine.add_request(Request(oracles.prompt(8), GREEDY))
    run(llm)
    assert order == ["launch", *["launch", "resolve"] * 5, "resolve"]  # no step too many: the length is known


def test_a_stop_found_one_step_late_drops_the_extra_token(llm):
    free = llm.generate([oracles.prompt(12)], GREEDY)[0].token_ids
    stop = next(token for token in free if free.index(token) >= 1)
    params = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(stop,))
    for _ in range(2):
        output = llm.generate([oracles.prompt(12)], params)[0]
        assert output.token_ids == free[: free.index(stop) + 1] and output.finish_reason == "stop"
        assert_all_back(llm)


def test_pages_freed_by_a_late_stop_are_reused_by_the_next_request_at_once(tiny_llama):
    """In a pool for one request, the next request gets the pages that the dropped token is written to."""
    texts = [oracles.prompt(12, seed=seed) for seed in range(6)]
    with LLM(tiny_llama, num_pages=64) as free:
        plain = [output.token_ids for output in free.generate(texts, GREEDY)]
    params = [SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(tokens[2],)) for tokens in plain]
    with LLM(tiny_llama, page_size=4, num_pages=5, prefix_cache=False, overlap=True) as small:
        outputs = small.generate(texts, params)
        expected = [tokens[: tokens.index(tokens[2]) + 1] for tokens in plain]
        assert [output.token_ids for output in outputs] == expected
        assert_all_back(small)


def test_a_stop_text_found_one_step_late_is_cut_from_the_text():
    llm = ScriptedLLM(EngineConfig(num_pages=50, page_size=16, overlap=True, debug_checks=True))
    llm.model.will_say("one STOP two")
    llm.engine.add_request(Request([5, 6, 7], SamplingParams(temperature=0, max_tokens=50, stop=("STOP",))))
    outputs = run(llm)
    assert outputs[-1].text == "one " and outputs[-1].finish_reason == "stop"
    assert "".join(output.delta for output in outputs) == "one "
    assert bytes(llm.model.script[:-1]) == b"two"  # one extra token was computed, and dropped
    assert_all_back(llm)


@pytest.mark.parametrize("when", range(9))
def test_an_abort_at_any_step_frees_every_page_and_changes_no_batch_mate(llm, when):
    mates = SamplingParams(n=2, max_tokens=4, seed=1, ignore_eos=True)
    expected = [output.token_ids for output in llm.generate([oracles.prompt(30, seed=1)], mates)]
    llm.reset_prefix_cache()
    llm.engine.add_request(Request(oracles.prompt(30), GREEDY, "doomed"))
    llm.engine.add_request(Request(oracles.prompt(30, seed=1), mates, "mate"))
    outputs = [output for _ in range(when) for output in llm.engine.step()]
    if "doomed" in llm.engine:
        llm.engine.abort("doomed")
    outputs += run(llm)
    final = {(output.request_id, output.index): output for output in outputs if output.finished}
    assert [final["mate", index].token_ids for index in range(2)] == expected
    assert final["doomed", 0].finish_reason == ("abort" if len(final["doomed", 0].token_ids) < 6 else "length")
    assert_all_back(llm)


def test_scores_are_complete_beside_other_requests_and_after_preemption(llm):
    text = oracles.prompt(45)
    with LLM(llm.folder, num_pages=64) as plain:
        expected = plain.score(text)
    llm.engine.add_request(Request(oracles.prompt(9, seed=4), GREEDY, "mate"))
    assert torch.equal(llm.score(text), expected)
    blocks = llm.score_blocks(text)
    rows = [next(blocks)]
    llm.engine.scheduler.preempt(llm.engine.scheduler.running[-1])
    assert torch.equal(torch.cat([*rows, *blocks]), expected)


@pytest.mark.parametrize("step_that_fails", [1, 2, 3, 5])
@pytest.mark.parametrize("place", ["launch", "resolve"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_an_error_ends_its_requests_and_an_interrupt_loses_no_token(llm, monkeypatch, step_that_fails, place, failure):
    sampled = SamplingParams(n=2, seed=1, max_tokens=6, ignore_eos=True)
    expected = [output.token_ids for output in llm.generate([oracles.prompt(20)], sampled)]
    llm.reset_prefix_cache()
    original, calls = getattr(stepping, place), itertools.count(1)

    def fails(*arguments):
        if next(calls) == step_that_fails:
            raise failure("a bug")
        return original(*arguments)

    monkeypatch.setattr(f"nanokv.engine.engine.{place}", fails)
    llm.engine.add_request(Request(oracles.prompt(20), sampled, "a"))
    outputs = []
    if failure is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            while True:
                outputs += llm.engine.step()
    outputs += run(llm)
    final = {output.index: output for output in outputs if output.finished}
    assert {output.finish_reason for output in final.values()} == {
        "length" if failure is KeyboardInterrupt else "error"
    }
    if failure is KeyboardInterrupt:
        assert [final[index].token_ids for index in range(2)] == expected
    assert_all_back(llm)
    monkeypatch.undo()
    assert [output.token_ids for output in llm.generate([oracles.prompt(20)], sampled)] == expected
