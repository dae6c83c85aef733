"""Ctrl-C: it arrives between steps or in a forward pass; an interrupt anywhere else makes the books anew."""

import multiprocessing
import random
import signal
import sys
from pathlib import Path

import pytest
from oracles import prompt

from nanokv import SamplingParams
from nanokv.core.request import Request
from nanokv.llm import LLM

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from soaks.interrupts import KINDS, Interruption, Subject, named

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(tiny_llama):
    with LLM(tiny_llama, page_size=4, num_pages=64, max_step_tokens=16, debug_checks=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def subjects():
    made: dict[str, Subject] = {}
    yield lambda model: made.setdefault(model, Subject(model))
    for subject in made.values():
        subject.llm.close()


def faults(subject: Subject, kind: str, places) -> list[str]:
    num_done = 0
    for place in places:
        interruption = Interruption(place, kind)
        if (wrong := subject.run(interruption)) is not None:
            return [f"{named(place)}: {wrong}"]  # the books may be wrong from here on
        num_done += interruption.done
    assert num_done >= 0.9 * len(places)  # a few lines run in the first run of a process alone
    return []


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_a_line_of_the_engine_breaks_nothing(subjects, kind):
    subject = subjects("tiny-gqa")
    assert faults(subject, kind, random.Random(kind).sample(subject.lines(kind), 12)) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-gqa", "tiny-hybrid"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_any_line_of_cache_and_engine_breaks_nothing(subjects, kind, model):
    subject = subjects(model)
    assert faults(subject, kind, subject.lines(kind)) == []


@pytest.mark.parametrize("place", ["plan", "commit"])
def test_ctrl_c_waits_for_the_forward_pass_or_the_end_of_the_step(llm, monkeypatch, place):
    owner, seen = (llm.engine.scheduler, []) if place == "plan" else (llm.engine.cache, [])
    original = getattr(owner, place)

    def signalled(*arguments, **more):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        seen.append(original(*arguments, **more))
        return seen[-1]

    monkeypatch.setattr(owner, place, signalled)
    llm.engine.add_request(Request(prompt(14), GREEDY, "r"))
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    assert len(seen) == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (request,) = llm.engine.outputs.of_id("r")
    assert request.num_generated == (1 if place == "commit" else 0)
    llm.engine.cache.check()


def test_ctrl_c_in_a_step_of_the_loop_loses_no_output(llm, monkeypatch):
    commit = llm.engine.cache.commit

    def signalled(*arguments, **more):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return commit(*arguments, **more)

    monkeypatch.setattr(llm.engine.cache, "commit", signalled)
    llm.engine.add_request(Request(prompt(14), GREEDY, "r"))
    with pytest.raises(KeyboardInterrupt):
        llm.loop.step()
    outputs = llm.loop.step()
    while llm.engine.has_work:
        outputs += llm.loop.step()
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_in_a_forward_pass_acts_at_once_and_keeps_the_prefix_tree(llm):
    llm.generate([prompt(20)], GREEDY)
    cached, forward = llm.stats()["pages_cached"], llm.engine.model.forward

    def signalled(*arguments):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the forward pass goes on")

    llm.engine.model.forward = signalled
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt(30)], GREEDY)
    llm.engine.model.forward = forward
    llm.engine.cache.check()
    assert llm.stats()["pages_cached"] >= cached and llm.stats()["pages_held"] == 0
    assert llm.generate([prompt(20)], GREEDY)[0].cached_tokens == 16


def test_a_second_ctrl_c_does_not_wait(llm):
    expected = llm.generate([prompt(20)], GREEDY)[0].token_ids
    commit, calls = llm.engine.cache.commit, []

    def signalled(*arguments, **more):
        llm.engine.cache.commit = commit
        signal.raise_signal(signal.SIGINT)
        calls.append(1)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one waits")

    llm.engine.cache.commit = signalled
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt(20)], GREEDY)
    assert calls == [1]
    llm.engine.cache.check()
    assert llm.stats()["pages_held"] == llm.stats()["pages_cached"] == 0  # made anew
    assert llm.generate([prompt(20)], GREEDY)[0].token_ids == expected


def test_ctrl_c_at_the_end_of_a_turn_leaves_the_handler_of_the_program_in_its_place(llm, monkeypatch):
    set_handler = signal.signal

    def signalled(number, handler):
        if handler is signal.default_int_handler:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return set_handler(number, handler)

    monkeypatch.setattr(signal, "signal", signalled)
    with pytest.raises(KeyboardInterrupt):
        llm.stats()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(llm.generate([prompt(8)], GREEDY)[0].token_ids) == 6


def test_a_handler_of_the_program_stays_in_its_place(llm):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        plan = llm.engine.scheduler.plan

        def signalled():
            signal.raise_signal(signal.SIGINT)
            seen.append(2)
            return plan()

        llm.engine.scheduler.plan = signalled
        assert llm.generate([prompt(8)], SamplingParams(max_tokens=1, temperature=0))[0].finish_reason == "length"
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[:2] == [1, 2]


def in_a_fork(llm, results) -> None:
    try:
        results.put(llm.generate([prompt(8)], GREEDY)[0].token_ids)
        results.put(llm.stats()["requests_running"])
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")
    llm.close()
    results.put("closed")


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("has_thread", [False, True])
def test_a_process_forked_after_the_load_answers_or_says_why_not(llm, has_thread):
    expected = llm.generate([prompt(8)], GREEDY)[0].token_ids
    stream = llm.stream(prompt(8, seed=1), GREEDY)
    next(stream)
    if has_thread:
        llm.loop.start()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=in_a_fork, args=(llm, results))
    child.start()
    first = results.get(timeout=60)
    if has_thread:
        assert "forked after the model was loaded" in first
    else:
        assert first == expected and results.get(timeout=60) == 0
    assert results.get(timeout=60) == "closed"
    child.join(60)
    assert child.exitcode == 0
    assert len(list(stream)) == 5 and llm.generate([prompt(8)], GREEDY)[0].token_ids == expected
