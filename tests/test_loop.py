"""EngineLoop: one driver for any number of threads; a call that arrives during a step waits until it ends."""

import gc
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
from oracles import prompt

from nanokv import SamplingParams
from nanokv.core.errors import NanokvError, RequestError
from nanokv.core.events import Matched
from nanokv.core.request import Request
from nanokv.engine.ticket import Inbox
from nanokv.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(tiny_llama):
    with LLM(tiny_llama, page_size=4, num_pages=64, max_step_tokens=16, debug_checks=True) as llm:
        yield llm


def test_a_ticket_yields_its_outputs_in_order_and_ends(llm):
    ticket = llm.loop.submit(Request(prompt(20), GREEDY, "r"))
    assert ticket.request_id == "r"
    assert [len(output.token_ids) for output in ticket] == [1, 2, 3, 4, 5, 6]
    assert list(ticket) == [] and not ticket.advance() and ticket.take() == []


def test_iterating_one_ticket_advances_all_requests(llm):
    one = llm.loop.submit(Request(prompt(8), SamplingParams(max_tokens=3, n=2, ignore_eos=True)))
    two = llm.loop.submit(Request(prompt(8, seed=1), GREEDY))
    assert sorted(output.index for output in one if output.finished) == [0, 1]
    steps = llm.stats()["steps"]
    assert len(two.take()) >= 2
    list(two)
    assert llm.stats()["steps"] - steps <= 5


def test_an_invalid_request_raises_and_leaves_nothing_behind(llm):
    with pytest.raises(RequestError):
        llm.loop.submit(Request([], GREEDY))
    assert llm.generate([prompt(8)], GREEDY)[0].finish_reason == "length"


def test_deleting_a_ticket_cancels_its_request(llm):
    ticket = llm.loop.submit(Request(prompt(20), GREEDY))
    next(ticket)
    del ticket
    assert not llm.engine.has_work and llm.stats()["pages_held"] == 0


def test_a_cancelled_ticket_still_yields_its_last_output(llm):
    ticket = llm.loop.submit(Request(prompt(20), GREEDY))
    next(ticket)
    ticket.cancel()
    assert [output.finish_reason for output in ticket] == ["abort"]


class Cycle:
    """Holds a stream in a reference cycle, which only the garbage collector frees."""

    def __init__(self, stream) -> None:
        self.stream, self.self = stream, self


def test_a_stream_garbage_collected_during_a_step_is_aborted_after_the_step(llm):
    cycle = weakref.ref(Cycle(llm.stream(prompt(30, seed=3), GREEDY)))
    gc.disable()
    try:
        forward, seen = llm.engine.model.forward, []

        def collecting(*arguments):
            gc.collect()
            seen.append(len(llm.engine.scheduler.running))
            return forward(*arguments)

        llm.engine.model.forward = collecting
        alone = llm.generate([prompt(20, seed=4)], GREEDY)[0].token_ids
        assert cycle() is None and seen[0] >= 1
    finally:
        gc.enable()
        llm.engine.model.forward = forward
    llm.engine.cache.check()
    llm.reset_prefix_cache()
    assert llm.generate([prompt(20, seed=4)], GREEDY)[0].token_ids == alone


def test_a_call_from_inside_a_step_is_an_error(llm):
    errors = []

    def subscriber(event) -> None:
        if not isinstance(event, Matched):
            return
        try:
            llm.reset_prefix_cache()
        except NanokvError as error:
            errors.append(str(error))

    llm.engine.events.subscribe(subscriber)
    assert llm.generate([prompt(8)], GREEDY)[0].finish_reason == "length"
    assert any("computes a step" in error for error in errors)


def test_threads_that_generate_reset_and_read_stats_get_the_same_tokens(llm):
    texts = [prompt(20, seed=seed) for seed in range(4)]
    alone = [output.token_ids for output in llm.generate(texts, GREEDY)]
    found, done = {}, threading.Event()

    def generate(number: int) -> None:
        for _ in range(3):
            found.setdefault(number, []).append(llm.generate([texts[number]], GREEDY)[0].token_ids)

    def disturb() -> None:
        while not done.is_set():
            llm.reset_prefix_cache()
            llm.stats()

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
    other = threading.Thread(target=disturb)
    for thread in [*threads, other]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    llm.engine.cache.check()
    assert found == {number: [alone[number]] * 3 for number in range(4)}


def test_a_started_loop_steps_the_engine_for_all_callers(llm):
    alone = llm.generate([prompt(20), prompt(12, seed=1)], GREEDY)
    llm.loop.start()
    try:
        ticket = llm.loop.submit(Request(prompt(20), GREEDY))
        assert list(ticket)[-1].token_ids == alone[0].token_ids
        assert llm.generate([prompt(12, seed=1)], GREEDY)[0].token_ids == alone[1].token_ids
        assert len(llm.score(prompt(9))) == 9
        assert llm.stats()["requests_running"] == 0
        dropped = llm.stream(prompt(30), GREEDY)
        del dropped
        llm.loop.call(lambda engine: engine.cache.check())
    finally:
        llm.loop.stop()
    assert llm.generate([prompt(20)], GREEDY)[0].token_ids == alone[0].token_ids


def in_time(function) -> list:
    """[function()], computed in a thread; [] where it takes longer than a minute."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(60)
    return results


def test_a_thread_that_is_stopped_at_once_ends(llm):
    def start_and_stop() -> None:
        for _ in range(200):
            llm.loop.start()
            llm.loop.stop()

    assert in_time(start_and_stop) == [None]


def test_a_request_added_while_the_thread_starts_is_stepped(llm):
    alone = llm.generate([prompt(20)], GREEDY)[0].token_ids
    turn = llm.loop._turn

    @contextmanager
    def late():
        llm.loop._turn = turn
        llm.loop.start()
        time.sleep(0.1)  # the thread finds no work, and waits
        with turn():
            yield

    llm.loop._turn = late
    ticket = llm.loop.submit(Request(prompt(20), GREEDY))
    assert in_time(lambda: list(ticket)[-1].token_ids) == [alone]
    llm.loop.stop()


def test_the_thread_cannot_stop_itself_and_goes_on(llm):
    llm.loop.start()
    for stop in (llm.loop.stop, llm.close):
        with pytest.raises(NanokvError, match="another thread"):
            llm.loop.call(lambda engine, stop=stop: stop())
    assert llm.generate([prompt(8)], GREEDY)[0].finish_reason == "length"
    llm.loop.stop()


def test_a_ticket_that_another_thread_closes_ends(llm):
    llm.loop.start()
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    ticket = llm.loop.submit(Request(prompt(8), long))
    seen = threading.Event()

    def read() -> int:
        count = 0
        for _ in ticket:
            count += 1
            seen.set()
        return count

    closer = threading.Thread(target=lambda: seen.wait() and ticket.close())
    closer.start()
    (count,) = in_time(read)
    assert 0 < count < 200
    closer.join()
    llm.loop.stop()


def broken() -> None:
    raise RuntimeError("as the test wished")


def test_a_fault_of_the_thread_reaches_every_caller(llm, monkeypatch, caplog):
    monkeypatch.setattr(llm.engine, "advance", broken)
    llm.loop.start()
    with pytest.raises(NanokvError, match="as the test wished"):
        list(llm.loop.submit(Request(prompt(8), GREEDY)))


def test_after_a_fault_a_call_is_refused_and_never_made(llm, monkeypatch, caplog):
    made = []
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine, "advance", broken)
        llm.loop.start()
        with pytest.raises(NanokvError, match="as the test wished"):
            list(llm.loop.submit(Request(prompt(8), GREEDY)))
        with pytest.raises(NanokvError, match="as the test wished"):
            llm.loop.call(made.append)
    llm.loop.stop()
    llm.loop.start()  # a new thread
    assert in_time(lambda: llm.generate([prompt(8)], GREEDY)[0].finish_reason) == ["length"]
    llm.loop.stop()
    assert made == []


def test_a_closed_loop_starts_no_thread(llm):
    llm.close()
    with pytest.raises(NanokvError, match="closed"):
        llm.loop.start()


def test_close_during_generate_gives_every_prompt_an_output(llm):
    outputs = []
    long = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    thread = threading.Thread(target=lambda: outputs.extend(llm.generate([prompt(8), prompt(9)], long)))
    thread.start()
    while not llm.stats()["steps"]:
        pass
    llm.close()
    thread.join()
    assert [output.finish_reason for output in outputs] in (["abort", "abort"], ["length", "length"])
    with pytest.raises(NanokvError, match="closed"):
        llm.generate([prompt(8)], GREEDY)


def test_the_end_of_a_sample_counts_once_though_it_is_told_twice(llm):
    """Ctrl-C in the middle of an end makes the engine end the sample again."""
    inbox = Inbox()
    inbox.num_samples = 2
    outputs = list(llm.generate([prompt(8)], SamplingParams(temperature=0, max_tokens=2, n=2, ignore_eos=True)))
    for output in (outputs[0], outputs[0], outputs[1]):
        inbox.put(output)
    assert [output.index for output in inbox.outputs] == [0, 1] and inbox.num_running == 0
