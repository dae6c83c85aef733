"""EngineLoop: the one driver of an engine. Owns the lock, the queue of calls and, once started, a thread.

    submit(request) -> Ticket      an iterator over the outputs; it steps the engine, or waits for the thread
    call(fn)                       runs fn(engine) between two steps
    cancel                         queues an abort and never blocks, so that a finalizer may cancel at any point

Nothing changes the engine during a step. Calls of other threads, and those of a garbage collection in the middle of a
step, wait in the queue until the step has ended.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TypeVar

import torch

from nanokv.core.errors import NanokvError
from nanokv.core.request import Request, RequestOutput
from nanokv.engine.engine import Engine
from nanokv.engine.output_processor import Sink
from nanokv.engine.ticket import Inbox, Ticket

logger = logging.getLogger("nanokv")

T = TypeVar("T")
WAIT_S = 0.05
"""Seconds for which a caller waits for the thread before it asks whether the thread has failed."""


class EngineLoop:
    """Drives one engine for any number of threads. Without a thread of its own, callers that need an output step it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._pid = os.getpid()
        self._lock = threading.RLock()  # held by the thread that changes the engine
        self._in_step = False
        self._has_turn = False  # the holder of the lock is in a turn, whose end runs the queued calls
        self._calls: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._wake: SimpleQueue[None] = SimpleQueue()  # wakes the thread; `put` is reentrant, so finalizers may wake it
        self._stepped = threading.Condition()  # notified after each turn of the thread
        self._failure: BaseException | None = None
        self._closed = False

    # -- for callers

    def submit(self, request: Request, sink: Sink | None = None) -> Ticket:
        """Queues a request. With a `sink`, that gets its outputs, in the thread that steps, and the ticket yields none.

        Raises RequestError where it cannot be served, NanokvError after `close`.
        """
        inbox = Inbox(sink)

        def add(engine: Engine) -> None:
            self._check_open()
            inbox.num_samples = getattr(request.params, "n", 1)  # not validated yet
            engine.add_request(request, inbox.put)

        try:
            self.call(add)
            return Ticket(request, inbox, self.advance, self.cancel)
        except KeyboardInterrupt:  # the request may be live, and no ticket will cancel it
            self.cancel(request, inbox)
            raise

    def call(self, fn: Callable[[Engine], T]) -> T:
        """Runs fn(engine) between two steps and returns its result, or raises its exception.

        Raises NanokvError inside a step, where subscribers of events run, and after a fault of the thread.
        """
        self._check_process()
        if not self._is_driven:
            with self._turn():
                return fn(self.engine)
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(self.engine))
                except BaseException as error:
                    future.set_exception(error)

        self._post(run)
        try:
            while not future.done():
                self._check_thread()
                with suppress(TimeoutError):
                    future.exception(WAIT_S)
        except BaseException:  # a fault of the thread, or Ctrl-C: the call may not run after its caller has left
            future.cancel()
            raise
        return future.result()

    def step(self) -> list[RequestOutput]:
        """One step, in the calling thread. Returns the outputs of requests that were added without a ticket."""
        self._check_process()
        with self._turn():
            self._step(self.engine.advance)
        return self.engine.outputs.take_outputs()  # after the turn, whose end may raise KeyboardInterrupt

    def cancel(self, request: Request, inbox: Inbox) -> None:
        """Aborts a request between two steps. Never blocks, so a finalizer may call it at any point."""

        def abort() -> None:
            if inbox.num_running > 0 and request.request_id is not None and request.id in self.engine:
                self.engine.abort(request.id)

        if inbox.num_running > 0 and os.getpid() == self._pid:
            self._post(abort)

    def start(self) -> None:
        """Starts a thread that steps whenever there is work; `stop` ends it. Raises NanokvError after `close`."""
        self._check_process()
        with self._lock:
            self._check_open()
            if self._thread is None or self._failure is not None:
                self._failure, self._wake = None, SimpleQueue()
                thread = threading.Thread(target=self._run, args=(self._wake,), name="engine", daemon=True)
                thread.start()
                self._thread = thread

    def stop(self) -> None:
        """Ends the thread after its step. Live requests stay: callers step them, or the next thread does.

        Raises NanokvError in the thread itself.
        """
        thread = self._thread
        if thread is threading.current_thread():
            raise NanokvError("the thread of the engine cannot stop itself: stop it from another thread")
        if thread is not None:
            self._thread = None  # the thread goes on only while this names it
            self._wake.put(None)
            thread.join()
            self._settle()

    def close(self) -> None:
        """Stops the thread, aborts live requests and closes the engine. Safe to call twice; does nothing in a fork.

        Raises NanokvError inside a step and in the thread itself.
        """
        if os.getpid() != self._pid:
            return
        self.stop()
        with self._turn():
            if not self._closed:
                self._closed = True
                self.engine.close()

    # -- for tickets

    def advance(self, inbox: Inbox) -> bool:
        """One step for a request without an output, or a short wait for the thread. False after its last output."""
        self._check_process()
        if not self._is_driven:
            with self._turn():
                if inbox.needs_step:
                    self._step(self.engine.advance)
                return inbox.is_open
        with self._stepped:
            if inbox.needs_step:
                self._stepped.wait(WAIT_S)
        if inbox.needs_step:
            self._check_thread()
        return inbox.is_open

    # -- inside

    @property
    def _is_driven(self) -> bool:
        """Whether the engine has a thread, and this is another one."""
        return self._thread is not None and self._thread is not threading.current_thread()

    def _step(self, step: Callable[[], T]) -> T:
        self._in_step = True
        try:
            return step()
        finally:
            self._in_step = False

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The right to change the engine. Queued calls run before it and after it. Turns of one thread may nest."""
        try:
            with self._lock, self.engine.interrupts.deferred():
                if self._in_step:
                    raise NanokvError("the engine computes a step: it cannot be called from inside a step")
                is_nested, self._has_turn = self._has_turn, True
                try:
                    while self._calls and not is_nested:
                        self._calls.popleft()()
                    yield
                finally:
                    self._has_turn = is_nested
        finally:
            self._settle()
            if self._is_driven and self._wake.empty():  # this turn may leave work to the thread
                self._wake.put(None)

    def _post(self, call: Callable[[], None]) -> None:
        """Queues a call. Never blocks."""
        self._calls.append(call)
        if self._thread is None:
            self._settle()
        elif self._wake.empty():
            self._wake.put(None)

    def _settle(self) -> None:
        """Runs queued calls, unless a turn is open: its end looks into the queue again."""
        while self._calls and self._lock.acquire(blocking=False):
            try:
                if self._has_turn:
                    return
                with self._turn():
                    pass
            finally:
                self._lock.release()

    def _run(self, wake: SimpleQueue[None]) -> None:
        try:
            with self._lock:  # `start` holds it until `_thread` names this thread
                pass
            while self._thread is threading.current_thread():
                with self._turn():
                    has_work = len(self.engine.outputs) > 0
                    if has_work:
                        self._step(self.engine.advance)
                with self._stepped:
                    self._stepped.notify_all()
                if not has_work:
                    wake.get()
        except BaseException as error:
            self._failure = error
            logger.exception("the thread of the engine ends")

    def _check_open(self) -> None:
        if self._closed:
            raise NanokvError("this LLM is closed: make a new one")

    def _check_process(self) -> None:
        """In a forked child, whose copy of the engine has lost its threads: goes on with one thread, or refuses."""
        if os.getpid() == self._pid:
            return
        if self._thread is not None or self.engine.transfers.connectors or self.engine.device.type != "cpu":
            raise NanokvError(
                "this process was forked after the model was loaded, and threads, processes or a GPU stay with the "
                "parent: load the model here, or start processes with the method 'spawn'"
            )
        torch.set_num_threads(1)  # OpenMP would wait for the threads of the parent for ever
        logger.warning("this process was forked after the model was loaded: it computes with one thread")
        was_busy = self._has_turn
        self.engine.interrupts.forget()
        self.__init__(self.engine)  # type: ignore[misc]  # the locks may belong to threads of the parent
        self.engine.forget_requests(was_busy)

    def _check_thread(self) -> None:
        if self._failure is not None:
            why = f"{type(self._failure).__name__}: {self._failure}"
            raise NanokvError(f"the engine has failed: {why}") from self._failure
