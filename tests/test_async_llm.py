"""AsyncLLM: streams and answers for asyncio, and requests that end with their tasks."""

import asyncio
import gc
import threading
import time
import weakref

import pytest
from oracles import prompt

from nanokv import AsyncLLM, SamplingParams, async_llm
from nanokv.core.errors import NanokvError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=180, ignore_eos=True)
HANG_S = 60.0
"""Bounds a test against a hang."""


@pytest.fixture(scope="module")
def llm(tiny_llama):
    llm = AsyncLLM(tiny_llama, num_pages=128, page_size=4)
    yield llm
    asyncio.run(llm.close())


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, HANG_S))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def live(llm: AsyncLLM) -> int:
    stats = llm.llm.stats()
    return stats["requests_running"] + stats["requests_waiting"]


def test_a_stream_yields_the_outputs_of_the_synchronous_one(llm):
    async def texts() -> list[list[int]]:
        return [output.token_ids async for output in llm.stream(prompt(9), GREEDY)]

    assert run(texts()) == [output.token_ids for output in llm.llm.stream(prompt(9), GREEDY)]


def test_answers_are_in_the_order_of_the_prompts_and_samples(llm):
    params = [SamplingParams(max_tokens=9 - place, seed=place, n=2, ignore_eos=True) for place in range(4)]
    texts = [prompt(5 + place, place) for place in range(4)]
    answers = run(llm.generate(texts, params))
    assert [one.token_ids for one in answers] == [one.token_ids for one in llm.llm.generate(texts, params)]
    assert run(llm.generate(prompt(6), GREEDY))[0].token_ids == llm.llm.generate(prompt(6), GREEDY)[0].token_ids
    assert run(llm.generate([], GREEDY)) == []


def test_tasks_share_steps(llm):
    async def both() -> int:
        before = llm.llm.stats()["steps"]
        await asyncio.gather(*(llm.generate(prompt(6, place), LONG) for place in range(4)))
        return llm.llm.stats()["steps"] - before

    assert run(both()) < 3 * 180


def test_event_loops_of_several_threads_use_one_llm(llm):
    expected = [llm.llm.generate(prompt(8, place), GREEDY)[0].token_ids for place in range(3)]
    answers: dict[int, list[int]] = {}

    def ask(place: int) -> None:
        answers[place] = run(llm.generate(prompt(8, place), GREEDY))[0].token_ids

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[place] for place in range(3)] == expected


@pytest.mark.parametrize("how", ["generate", "stream"])
def test_cancelling_a_task_aborts_its_requests(llm, how):
    async def consume() -> None:
        async for _ in llm.stream(prompt(9), LONG):
            pass

    async def cancel() -> None:
        task = asyncio.create_task(llm.generate([prompt(9), prompt(8)], LONG) if how == "generate" else consume())
        await until(lambda: live(llm) > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: live(llm) == 0)

    run(cancel())
    assert llm.llm.stats()["pages_held"] == 0


def test_a_task_cancelled_while_its_request_is_queued_leaves_none(llm):
    async def cancel() -> None:
        for pause in range(12):
            task = asyncio.create_task(llm.generate([prompt(9)] * 3, LONG))
            await asyncio.sleep(pause / 4000)
            task.cancel()
        await asyncio.sleep(0.05)
        await until(lambda: live(llm) == 0)

    run(cancel())


@pytest.mark.parametrize("how", ["closed", "dropped", "left at the end of the event loop"])
def test_a_stream_that_is_left_aborts_its_request(llm, monkeypatch, how):
    advance = llm.llm.engine.advance
    # 180 steps take 9 s: the abort comes before their end on a busy machine too.
    monkeypatch.setattr(llm.llm.engine, "advance", lambda: time.sleep(0.05) or advance())

    async def leave() -> None:
        stream = llm.stream(prompt(9), LONG)
        assert len((await anext(stream)).token_ids) == 1
        if how == "closed":
            await stream.aclose()
            assert [output async for output in stream] == []
        if how == "dropped":
            del stream
            await until(lambda: live(llm) == 0)

    steps = llm.llm.stats()["steps"]
    run(leave())
    run(until(lambda: live(llm) == 0))
    assert llm.llm.stats()["steps"] - steps < 170


def test_an_event_loop_that_is_closed_breaks_no_step(llm):
    """The reader is gone without a word, as in a program that stops its event loop."""
    loop = asyncio.new_event_loop()
    stream = llm.stream(prompt(9), LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    assert run(llm.generate(prompt(7), GREEDY))[0].finish_reason == "length"
    del stream
    gc.collect()
    run(until(lambda: live(llm) == 0))


def test_a_prompt_that_cannot_be_served_raises_and_none_of_its_batch_is(llm):
    async def first(stream) -> None:
        await anext(stream)

    for call in (
        lambda: llm.generate([prompt(5), [10**6]], GREEDY),
        lambda: llm.generate(prompt(5), 5),
        lambda: llm.generate("a text", GREEDY),
        lambda: first(llm.stream([10**6], GREEDY)),
        lambda: first(llm.stream(5, GREEDY)),
        lambda: llm.generate(prompt(5), temperature=0),
        lambda: first(llm.stream(prompt(5), tempereture=0)),
        lambda: llm.chat([{"role": "user", "content": "hi"}]),
    ):
        with pytest.raises(RequestError):
            run(call())
    run(until(lambda: live(llm) == 0))


def test_chats_are_answered_one_or_several():
    async def talk() -> None:
        async with AsyncLLM("tiny-gqa", num_pages=64) as llm:
            chats = [[{"role": "user", "content": text}] for text in ("Hello", "Bye")]
            several = await llm.chat(chats, GREEDY)
            assert [one.token_ids for one in several] == [(await llm.chat(one, GREEDY)).token_ids for one in chats]
            outputs = [output async for output in llm.stream_chat(chats[1], GREEDY)]
            assert outputs[-1].text == several[1].text and len(outputs) == 8
            with pytest.raises(RequestError, match="one conversation"):
                await anext(llm.stream_chat(chats))

    run(talk())


def test_closing_ends_every_task_with_an_output_or_an_error(tiny_llama):
    async def close_beside() -> None:
        llm = AsyncLLM(tiny_llama, num_pages=64)
        task = asyncio.create_task(llm.generate([prompt(8), prompt(9)], LONG))
        await until(lambda: llm.llm.stats()["steps"] > 2)
        await llm.close()
        outputs = await task
        assert [output.finish_reason for output in outputs] in (["abort", "abort"], ["length", "length"])
        with pytest.raises(NanokvError, match="closed"):
            await llm.generate(prompt(5))
        await llm.close()

    run(close_beside())


def test_a_fault_of_the_engines_thread_reaches_every_task(tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr(async_llm, "SILENCE_S", 0.05)

    async def fail() -> None:
        llm = AsyncLLM(tiny_llama, num_pages=64)

        def broken() -> None:
            raise MemoryError("a fault of the machine")

        monkeypatch.setattr(llm.llm.engine, "advance", broken)
        with pytest.raises(NanokvError, match="the engine has failed: MemoryError"):
            await llm.generate(prompt(5), GREEDY)
        monkeypatch.undo()
        await llm.close()

    run(fail())


def test_an_async_llm_that_is_dropped_frees_its_engine(tiny_llama):
    llm = AsyncLLM(tiny_llama, num_pages=16)
    assert run(llm.generate(prompt(5), GREEDY))[0].finish_reason == "length"
    engine = weakref.ref(llm.llm.engine)
    del llm
    end = time.monotonic() + HANG_S
    while engine() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert engine() is None
