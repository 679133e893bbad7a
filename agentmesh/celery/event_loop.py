"""One asyncio loop thread per process, and `run_sync` for synchronous code to run a coroutine on it; loads no Celery.

Where gevent or eventlet have made threads greenlets, the loop still has an OS thread, because a greenlet cannot run one.
"""

import asyncio
import concurrent.futures
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S, MAX_POLL_S = 0.001, 0.02  # how often a greenlet checks whether the loop has finished its coroutine

# One loop per process id: a forked child finds no entry of its own and makes a new loop and thread.
_LOOPS: "dict[int, _LoopThread]" = {}


class NativeThread:
    """A daemon thread of the operating system, also where `threading` is patched to make greenlets."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        self._target, self._name = target, name
        self._ended = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        native = _native_start()
        if native is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        else:
            native(self._run, ())

    def join(self, timeout_s: float) -> bool:
        """Whether it has ended within the time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        deadline = time.monotonic() + timeout_s
        while not self._ended and time.monotonic() < deadline:
            time.sleep(MAX_POLL_S)
        return self._ended

    def _run(self) -> None:
        try:
            self._target()
        finally:
            self._ended = True


def loop_of_this_process() -> asyncio.AbstractEventLoop:
    """The loop on this process's daemon thread; made at first use, never closed."""
    pid = os.getpid()
    thread = _LOOPS.get(pid)
    if thread is None:
        new_thread = _LoopThread()
        thread = _LOOPS.setdefault(pid, new_thread)  # atomic: of two callers one wins, without a lock
        if thread is new_thread:
            NativeThread(new_thread.run, "agentmesh-loop").start()
    while thread.loop is None:
        time.sleep(POLL_S)
    return thread.loop


class _LoopThread:
    """A loop, made by the thread that runs it: gevent ties a loop's selector to the thread where it is made."""

    loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.call_soon(setattr, self, "loop", loop)
        loop.run_forever()


def run_sync(coro: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns, for a caller without a loop: a client, or a task on any pool except ours.

    Raises:
        RuntimeError: called on the loop's own thread, which would wait for itself for ever.
    """
    loop = loop_of_this_process()
    if asyncio._get_running_loop() is loop:
        coro.close()
        raise RuntimeError("run_sync() was called on the thread of its event loop: await the coroutine instead")
    future = asyncio.run_coroutine_threadsafe(coro, loop)
    try:
        if threads_are_green():
            poll_s = POLL_S
            while not future.done():  # the future's own wait would block the thread with every other greenlet
                time.sleep(poll_s)
                poll_s = min(poll_s * 1.5, MAX_POLL_S)
        return future.result()
    except BaseException:
        future.cancel()  # after Ctrl-C in the caller; without effect on a finished future
        raise


def threads_are_green() -> bool:
    """Whether gevent or eventlet have made threads greenlets."""
    return _native_start() is not None


def _native_start() -> Callable[..., Any] | None:
    """The function that starts an OS thread where `threading` is patched, else None.

    Checks sys.modules only: a worker that has imported eventlet never ends.
    """
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return _start_in_gevent_pool
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        start_thread: Callable[..., Any] = eventlet.original("_thread").start_new_thread
        return start_thread
    return None


def _start_in_gevent_pool(target: Callable[[], None], _args: Any) -> None:
    # gevent's own pool, of one thread: patched code crashes the process in a thread that gevent does not know
    importlib.import_module("gevent.threadpool").ThreadPool(1).spawn(target)


class _GeventThreads(concurrent.futures.Executor):
    """OS threads for blocking calls where gevent has patched the standard executor's queue and locks."""

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._pool: Any = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":
        if self._pool is None:  # made on the loop's thread, whose hub is notified of results
            self._pool = importlib.import_module("gevent.threadpool").ThreadPool(self._max_threads)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def call() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._pool.spawn(call)
        return future


def blocking_executor(max_threads: int) -> concurrent.futures.Executor | None:
    """An executor for blocking calls from the loop where the standard one does not work (gevent), else None."""
    gevent = sys.modules.get("gevent.monkey")
    return _GeventThreads(max_threads) if gevent is not None and gevent.is_module_patched("threading") else None
