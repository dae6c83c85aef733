"""AsyncLLM: LLM for asyncio. The engine runs in a thread of its own, and hands each output to its event loop.

async with AsyncLLM("smollm2-135m-instruct") as llm:
    async for output in llm.stream("Once upon a time"):
        print(output.delta, end="", flush=True)

event loop                          a thread of the pool           the thread of the engine
stream, generate --to_thread------> encode, score, submit
queue <---------------------------------------------------------- call_soon_threadsafe(output)
cancelled, closed ------------------------------------------------> abort, between two steps
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Never, overload

from nanokv.chats import Messages, are_several, chat_prompt, chat_prompts
from nanokv.core.arguments import no_such
from nanokv.core.config import EngineConfig
from nanokv.core.errors import RequestError
from nanokv.core.request import RequestOutput, SamplingParams
from nanokv.disagg.config import DisaggConfig
from nanokv.engine.loop import EngineLoop
from nanokv.engine.output_processor import Sink
from nanokv.engine.ticket import Ticket
from nanokv.llm import LLM, Params, Prompt, in_order

SILENCE_S = 1.0
"""Seconds without an output after which a caller asks whether the thread of the engine has failed."""


class AsyncLLM:
    """An LLM whose methods are coroutines and async generators, for any number of tasks and event loops.

    Arguments and errors are those of LLM, and loading blocks as there. `llm` is that LLM; it may be used beside this,
    from other threads. A task that is cancelled, and a generator that is closed, abort their requests; a prompt whose
    prompt_logprobs are asked for is scored to its end first.
    """

    def __init__(
        self, model: str | Path, config: EngineConfig | None = None, disagg: DisaggConfig | None = None, **fields: Any
    ) -> None:
        self.llm = LLM(model, config, disagg, **fields)
        self.llm.loop.start()
        weakref.finalize(self, _stop, self.llm.loop).atexit = False  # where close() was not called

    async def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, **unknown: Never
    ) -> list[RequestOutput]:
        """Finished outputs, as of `LLM.generate`."""
        if unknown:
            raise no_such(RequestError, "generate", unknown, ("prompts", "params"), SamplingParams)
        tickets: list[Ticket] = []
        submit = partial(self.llm._submit, tickets, prompts, params)
        async with aclosing(self._outputs(tickets, submit)) as outputs:
            finished = [output async for output in outputs if output.finished]
        return in_order(tickets, finished)

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **unknown: Never
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one prompt as they come, the new text of each in `.delta`. Closing the generator aborts.

        Raises RequestError at the first output when the prompt cannot be served.
        """
        if unknown:
            raise no_such(RequestError, "stream", unknown, ("prompt", "params"), SamplingParams)
        tickets: list[Ticket] = []

        def submit(sink: Sink) -> None:
            tickets.append(self.llm.loop.submit(self.llm._request(prompt, params), sink))

        async with aclosing(self._outputs(tickets, submit)) as outputs:
            async for output in outputs:
                yield output

    @overload
    async def chat(self, messages: Messages, params: Params = ..., **template: Any) -> RequestOutput: ...
    @overload
    async def chat(self, messages: list[Messages], params: Params = ..., **template: Any) -> list[RequestOutput]: ...
    async def chat(
        self, messages: Messages | list[Messages], params: Params = None, **template: Any
    ) -> RequestOutput | list[RequestOutput]:
        """The answer to a conversation, or a list of answers to a list of conversations, as of `LLM.chat`."""
        prompts = await asyncio.to_thread(chat_prompts, self.llm.tokenizer, messages, params, template)
        answers = await self.generate(prompts, params)
        return answers if are_several(messages) else answers[0]

    async def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, **template: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """`chat` of one conversation, as `stream`."""
        prompt = await asyncio.to_thread(chat_prompt, self.llm.tokenizer, messages, template)
        async with aclosing(self.stream(prompt, params)) as outputs:
            async for output in outputs:
                yield output

    async def close(self) -> None:
        """Aborts live requests, whose tasks get outputs with "abort", and closes the LLM. Safe to call twice."""
        await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"Async{self.llm!r}"

    async def _outputs(
        self, tickets: list[Ticket], submit: Callable[[Sink], None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of requests as they come. `submit` queues them and fills `tickets`, closed at the end."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[RequestOutput] = asyncio.Queue()

        def deliver(output: RequestOutput) -> None:
            with suppress(RuntimeError):  # the event loop is closed: its generators have closed their tickets, or will
                loop.call_soon_threadsafe(queue.put_nowait, output)

        try:
            await asyncio.to_thread(submit, deliver)
            num_running = sum(ticket.request.params.n for ticket in tickets)
            while num_running:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        output = await queue.get()
                except TimeoutError:
                    for ticket in tickets:
                        if await asyncio.to_thread(ticket.advance):  # raises where the thread of the engine has failed
                            break
                    continue
                num_running -= output.finished
                yield output
        finally:
            for ticket in tickets:
                ticket.close()


def _stop(loop: EngineLoop) -> None:
    """Ends the thread of an engine. A garbage collection may call this in that thread, which cannot wait for itself."""
    threading.Thread(target=loop.stop, name="engine stops", daemon=True).start()
