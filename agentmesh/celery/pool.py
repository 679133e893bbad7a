"""The Celery pool of asyncio queues: one event loop per worker process, hundreds of coroutines in flight."""

import asyncio
import concurrent.futures
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import cached_property
from time import monotonic
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency.base import BasePool, apply_target
from celery.utils.log import get_logger
from celery.utils.saferepr import saferepr

from agentmesh.celery.event_loop import loop_of_this_process
from agentmesh.engine.engine import Skipped

logger = get_logger("agentmesh.pool")

KEEP_ALIVE_S = 0.5  # how often a consumer keeps its connection alive while the pool drains
CANCEL_S = 2.0  # how long a cancelled coroutine may take to clean up


class RunningCoroutine:
    """A coroutine in flight. Celery has a weak reference to it as the request's handle; the pool keeps it until its end."""

    __slots__ = ("__weakref__", "_callback", "_coro", "_name", "_pool", "_queue", "_stopped", "task")

    def __init__(
        self, pool: "TaskPool", name: str, coro: Callable[[], Coroutine[Any, Any, Any]],
        callback: Callable[[Any], None], queue: str = "",
    ) -> None:  # fmt: skip
        self._pool, self._name, self._coro, self._callback, self._queue = pool, name, coro, callback, queue
        self._stopped = False
        self.task: asyncio.Task[None] | None = None

    def terminate(self, signal: int | None = None) -> None:
        """Cancel it, from any thread: revoke(terminate=True) and the cold shutdown call this."""
        self._pool.loop.call_soon_threadsafe(self.cancel)

    def cancel(self) -> None:
        """Cancel it, on the loop. It reports nothing then: the caller has told Celery already."""
        self._stopped = True
        if self.task is not None:
            self.task.cancel()
            self._pool.ended(self)  # one that is cancelled before it runs never reaches its own `finally`

    async def run(self) -> None:
        """Await the coroutine and report its end to Celery, which acknowledges the message."""
        started = monotonic()
        try:
            if self._stopped:
                return
            value = await self._coro()
            if isinstance(value, Skipped):
                self._pool.on_skipped(self._queue)
            self._report((0, "None" if value is None else saferepr(value), monotonic() - started))
        except BaseException as error:  # a SystemExit of one step would end the loop, and every other step
            if self._stopped and isinstance(error, asyncio.CancelledError):
                return
            logger.error("task %s raised: %r", self._name, error, exc_info=True)
            self._report((1, _einfo(error), monotonic() - started))
        finally:
            self._pool.ended(self)

    def _report(self, outcome: tuple[int, Any, float]) -> None:
        try:
            self._callback(outcome)
        except Exception:
            logger.exception("task %s could not be reported to Celery", self._name)


def _einfo(error: BaseException) -> Any:
    info = ExceptionInfo(sys.exc_info())
    # ExceptionInfo wraps the exception for pickling; Flower should show the exception itself. And on_success re-raises a
    # SystemExit or KeyboardInterrupt, which would end the loop.
    info.exception = error if isinstance(error, Exception) else RuntimeError(repr(error))
    return info


class TaskPool(BasePool):  # type: ignore[misc]  # Celery has no types
    """Awaits tasks that have a `coro` on this process's loop; runs any other task on a thread.

    A task with `coro` must ignore its result: the call bypasses Celery's tracer, so no backend and no task signal
    sees it; acks, events, revoke and shutdown are Celery's. How many are in flight is the worker's prefetch (`-c` with
    late acks and multiplier 1); the pool itself refuses nothing.
    """

    signal_safe = False
    body_can_be_buffer = True
    # Celery keeps this in a global; True would make every `.get()` in a notebook with a worker thread an error.
    task_join_will_block = False

    grace_s: float = 30.0
    loop: asyncio.AbstractEventLoop

    def __init__(self, limit: int | None = None, **options: Any) -> None:
        super().__init__(limit, **options)
        self._running: set[RunningCoroutine] = set()
        self._arrived: deque[RunningCoroutine] = deque()
        self._woken = False
        self._pid = os.getpid()
        self._on_threads: set[concurrent.futures.Future[None]] = set()
        self.meanwhile: Callable[[], None] = lambda: None  # what a consumer does while the pool drains
        # called with the queue of each message that had no step to do
        self.on_skipped: Callable[[str], None] = lambda queue: None
        self.room = threading.Event()  # set when a task ends, for a consumer whose prefetch is full

    @property
    def in_flight(self) -> int:
        """How many tasks run."""
        return len(self._running) + len(self._on_threads)

    @property
    def full(self) -> bool:
        """Whether as many are in flight as the limit allows."""
        return self.in_flight >= (self.limit or 1)

    def on_start(self) -> None:
        """Use the loop of this process; after a fork the pid is another one."""
        self.loop, self._pid = loop_of_this_process(), os.getpid()

    def apply_async(
        self, target: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
        callback: Callable[[Any], None] | None = None, accept_callback: Callable[[int, float], None] | None = None,
        **_: Any,
    ) -> Any:  # fmt: skip
        """Start the task of a request; returns the handle that can terminate it."""
        task = self.app.tasks[args[0]]
        coro = getattr(task, "coro", None)
        if coro is None:
            return self._on_a_thread(target, args, kwargs, callback, accept_callback)
        request = args[2]  # Request has decoded the body already
        if accept_callback is not None:
            accept_callback(self._pid, monotonic())
        running = RunningCoroutine(
            self, args[0], lambda: coro(*request["args"], **request["kwargs"]), callback or (lambda _outcome: None),
            (request.get("delivery_info") or {}).get("routing_key") or "",
        )  # fmt: skip
        self._running.add(running)
        self._arrived.append(running)
        if not self._woken:  # one wake-up serves all that arrive before the loop runs `_begin`
            self._woken = True
            self.loop.call_soon_threadsafe(self._begin)
        return running

    def _begin(self) -> None:
        self._woken = False  # first: an append after this line wakes the loop again
        while self._arrived:
            running = self._arrived.popleft()
            running.task = self.loop.create_task(running.run())

    def ended(self, running: RunningCoroutine) -> None:
        """Called on the loop by each coroutine at its end."""
        self._running.discard(running)
        self.room.set()

    # ---- tasks without a coroutine ----

    @cached_property
    def _executor(self) -> concurrent.futures.ThreadPoolExecutor:
        return concurrent.futures.ThreadPoolExecutor(max_workers=self.limit, thread_name_prefix="agentmesh-task")

    def _on_a_thread(
        self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None,
        callback: Callable[[Any], None] | None, accept_callback: Callable[[int, float], None] | None,
    ) -> None:  # fmt: skip
        # The tracer falls back to current_app, which need not be the app of this worker: pass it.
        future = self._executor.submit(
            apply_target, target, args, {**(kwargs or {}), "app": self.app}, callback, accept_callback
        )
        self._on_threads.add(future)
        future.add_done_callback(self._thread_ended)

    def _thread_ended(self, future: "concurrent.futures.Future[None]") -> None:
        self._on_threads.discard(future)
        self.room.set()
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.error("a task on a thread could not be traced", exc_info=error)

    # ---- shutdown ----

    def on_stop(self) -> None:
        """Wait for running tasks, up to `grace_s`; then cancel them, un-acked."""
        deadline = monotonic() + self.grace_s
        drained = asyncio.run_coroutine_threadsafe(self._drain(self.grace_s), self.loop)
        while not concurrent.futures.wait([drained], timeout=KEEP_ALIVE_S).done:
            self.meanwhile()
        drained.result()
        if "_executor" in self.__dict__:
            concurrent.futures.wait(tuple(self._on_threads), timeout=max(0.0, deadline - monotonic()))
            self._executor.shutdown(wait=False, cancel_futures=True)
            del self.__dict__["_executor"]

    def on_terminate(self) -> None:
        """The cold shutdown: cancel at once."""
        self.grace_s = 0.0
        self.on_stop()

    async def _drain(self, grace_s: float) -> None:
        self._begin()
        tasks = {r.task for r in self._running if r.task is not None}
        if not tasks:
            return
        late = tasks if grace_s <= 0 else (await asyncio.wait(tasks, timeout=grace_s))[1]
        if late:
            logger.warning("%d steps did not finish within %s s and were cancelled", len(late), grace_s)
        for running in tuple(self._running):
            running.cancel()
        if late:
            await asyncio.wait(late, timeout=CANCEL_S)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Nothing: a coroutine has no process; its handle's `terminate` cancels it."""

    def _get_info(self) -> dict[str, Any]:
        return {**super()._get_info(), "running": len(self._running), "threads": len(self._on_threads)}
