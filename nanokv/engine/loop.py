"""EngineLoop: the one driver of an engine. Owns the lock, the queue of calls, and, when asked to, a thread.

    submit(request) -> Ticket      its outputs, in order; iterating it steps the engine, or waits for the thread
    call(fn)                       runs fn(engine) between two steps
    cancel, finalizers             are noted at once and act between two steps

Nothing changes the engine while it computes a step: whatever comes during one, from another thread or from a garbage
collection in the middle of it, waits in the queue of calls.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from nanokv.core.errors import NanokvError
from nanokv.core.request import Request, RequestOutput
from nanokv.engine.engine import Engine

logger = logging.getLogger("nanokv")

T = TypeVar("T")
WAIT_S = 0.05
"""How long `Ticket.advance` waits for the thread before it returns."""


class Inbox:
    """The outputs of one request that its ticket has not taken yet. Does not hold the ticket: dropping that cancels."""

    def __init__(self) -> None:
        self.outputs: deque[RequestOutput] = deque()
        self.num_running = 0  # samples that have not ended

    def put(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        self.num_running -= output.finished


class Ticket:
    """One submitted request: an iterator over its outputs, which ends after the last one.

    Closing it, or dropping it, cancels the request if it still runs.
    """

    def __init__(self, loop: EngineLoop, request: Request, inbox: Inbox) -> None:
        self.request = request
        self.request_id = str(request.request_id)
        self._loop = loop
        self._inbox = inbox

    def __iter__(self) -> Ticket:
        return self

    def __next__(self) -> RequestOutput:
        while not self._inbox.outputs:
            if not self.advance():
                raise StopIteration
        return self._inbox.outputs.popleft()

    def advance(self) -> bool:
        """One step of the engine if this request still runs, or a short wait for the thread; False when it is over."""
        return self._loop.advance(self._inbox)

    def take(self) -> list[RequestOutput]:
        """The outputs that are there, without a step."""
        outputs = self._inbox.outputs
        return [outputs.popleft() for _ in range(len(outputs))]

    def cancel(self) -> None:
        """Aborts the request between two steps, if it still runs. Outputs that are there stay."""
        self._loop.cancel(self.request_id, self._inbox)

    def close(self) -> None:
        """Cancels, and drops the outputs."""
        self.cancel()
        self._inbox = Inbox()

    def __del__(self) -> None:
        self.cancel()


class EngineLoop:
    """Drives one engine, from any number of threads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.RLock()  # held by the thread that changes the engine
        self._in_step = self._busy = False
        self._calls: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()  # something to do for the thread
        self._arrived = threading.Condition()  # the thread has stepped
        self._stopping = self._closed = False
        self._failure: BaseException | None = None

    # -- for callers

    def submit(self, request: Request) -> Ticket:
        """Queues a request. Raises RequestError where it cannot be served, NanokvError after `close`."""
        inbox = Inbox()

        def add(engine: Engine) -> None:
            if self._closed:
                raise NanokvError("this LLM is closed: make a new one")
            engine.add_request(request, inbox.put)
            inbox.num_running = request.params.n

        self.call(add)
        return Ticket(self, request, inbox)

    def call(self, fn: Callable[[Engine], T]) -> T:
        """Runs fn(engine) between two steps and returns its result, or raises what it raises.

        Raises NanokvError inside a step, where a subscriber of events or a finalizer may find itself.
        """
        if self._thread is None or self._thread is threading.current_thread():
            with self._turn():
                return fn(self.engine)
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(fn(self.engine))
            except BaseException as error:
                future.set_exception(error)

        self._post(run)
        while not wait([future], WAIT_S).done:
            self._check_thread()
            if self._thread is None:  # stopped meanwhile
                self._settle()
        return future.result()

    def step(self) -> list[RequestOutput]:
        """One step, in this thread. Returns the outputs of requests that the engine was given without a ticket."""
        with self._turn():
            return self._step(self.engine.step)

    def cancel(self, request_id: str, inbox: Inbox) -> None:
        """Aborts a request between two steps. Never waits, so that a finalizer may call it anywhere."""
        if inbox.num_running > 0:
            self._post(lambda: self.engine.abort(request_id) if request_id in self.engine else None)

    def start(self) -> None:
        """Steps in a thread of its own from now on, whenever there is work."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step; live requests wait for whoever steps next."""
        thread = self._thread
        if thread is not None:
            self._stopping = True
            self._wake.set()
            thread.join()
            self._thread = None
            self._settle()

    def close(self) -> None:
        """Stops the thread, aborts what runs and closes the engine. Safe to call twice."""
        self.stop()
        with self._turn():
            if not self._closed:
                self._closed = True
                self.engine.close()

    # -- for tickets

    def advance(self, inbox: Inbox) -> bool:
        """One step for a request, or a wait for the thread; False when the request is over."""
        if self._thread is not None and self._thread is not threading.current_thread():
            with self._arrived:
                if inbox.num_running > 0 and not inbox.outputs:
                    self._arrived.wait(WAIT_S)
            self._check_thread()
            return inbox.num_running > 0 or bool(inbox.outputs)
        with self._turn():
            if inbox.num_running > 0 and not inbox.outputs:  # else another thread has stepped for it meanwhile
                self._step(self.engine.advance)
            return inbox.num_running > 0 or bool(inbox.outputs)

    # -- inside

    def _step(self, step: Callable[[], T]) -> T:
        self._in_step = True
        try:
            return step()
        finally:
            self._in_step = False

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The right to change the engine, after what was noted before."""
        try:
            with self._lock:
                if self._in_step:
                    raise NanokvError("the engine computes a step: nothing can be asked of it from inside")
                nested, self._busy = self._busy, True
                try:
                    if not nested:
                        self._drain()
                    yield
                finally:
                    self._busy = nested
        finally:
            self._settle()

    def _post(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._wake.set()
        if self._thread is None:
            self._settle()

    def _settle(self) -> None:
        """Does what is noted, unless another thread holds the lock: that one looks again after it lets go."""
        while self._calls and self._lock.acquire(blocking=False):
            try:
                if self._busy:  # this very thread is at it, and looks again
                    return
                self._busy = True
                try:
                    self._drain()
                finally:
                    self._busy = False
            finally:
                self._lock.release()

    def _drain(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                with self._turn():
                    if len(self.engine.outputs):
                        self._step(self.engine.advance)
                        self._wake.set()
                with self._arrived:
                    self._arrived.notify_all()
                self._wake.wait()
        except BaseException as error:
            self._failure = error
            logger.exception("the thread of the engine ends")

    def _check_thread(self) -> None:
        if self._failure is not None:
            raise NanokvError(f"the engine has failed: {self._failure}") from self._failure
