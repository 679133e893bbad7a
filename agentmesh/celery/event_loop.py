"""One asyncio loop thread per process, and a way for synchronous code to run a coroutine on it; knows no Celery.

Where gevent or eventlet made threads greenlets, the loop still has an OS thread of its own: a greenlet cannot run one.
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
POLL_S, MAX_POLL_S = 0.001, 0.02  # how often a greenlet looks whether the loop is through with its coroutine

# One loop per process id: a forked child finds no entry of its own and makes a new loop and thread.
_LOOPS: "dict[int, _LoopThread]" = {}


class NativeThread:
    """A daemon thread of the operating system, also where `threading` means greenlets."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        self._target, self._name = target, name
        self._over = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
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
        while not self._over and time.monotonic() < deadline:
            time.sleep(MAX_POLL_S)
        return self._over

    def _run(self) -> None:
        try:
            self._target()
        finally:
            self._over = True


def loop_of_this_process() -> asyncio.AbstractEventLoop:
    """The loop that runs on this process's daemon thread; made at first use, never closed."""
    pid = os.getpid()
    held = _LOOPS.get(pid)
    if held is None:
        turning = _LoopThread()
        held = _LOOPS.setdefault(pid, turning)  # atomic: of two threads that get here one wins, without a lock
        if held is turning:
            NativeThread(turning.run, "agentmesh-loop").start()
    while held.loop is None:
        time.sleep(POLL_S)
    return held.loop


class _LoopThread:
    """A loop, made by the thread that runs it: gevent ties a loop's selector to the thread where it is made."""

    loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.call_soon(setattr, self, "loop", loop)
        loop.run_forever()


def run_sync(coro: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns, for a caller without a loop: a client, or a task on any pool but ours.

    Raises:
        RuntimeError: called on the loop's own thread, which would wait for itself for ever.
    """
    loop = loop_of_this_process()
    if asyncio._get_running_loop() is loop:
        coro.close()
        raise RuntimeError("drive() was called on the event loop's own thread; await the coroutine instead")
    future = asyncio.run_coroutine_threadsafe(coro, loop)
    try:
        if threads_are_green():
            look_s = POLL_S
            while not future.done():  # a future's own wait would hold the thread, and with it every other greenlet
                time.sleep(look_s)
                look_s = min(look_s * 1.5, MAX_POLL_S)
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C of the caller; does nothing to one that is done
        raise


def threads_are_green() -> bool:
    """Whether gevent or eventlet have made threads greenlets."""
    return _native_start() is not None


def _native_start() -> Callable[..., Any] | None:
    """What starts a thread of the operating system where `threading` is patched, else None.

    Asks sys.modules only: importing eventlet just to ask leaves a worker that never ends.
    """
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return _in_gevents_pool
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        start_thread: Callable[..., Any] = eventlet.original("_thread").start_new_thread
        return start_thread
    return None


def _in_gevents_pool(target: Callable[[], None], _args: Any) -> None:
    # a pool of one that is gevent's: in a thread that gevent does not know, its patched parts crash the process
    importlib.import_module("gevent.threadpool").ThreadPool(1).spawn(target)


class _GeventThreads(concurrent.futures.Executor):
    """OS threads for blocking calls where gevent has patched the standard executor's queue and locks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pool: Any = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":
        if self._pool is None:  # on the loop's thread: it is that thread's hub which is told of ends
            self._pool = importlib.import_module("gevent.threadpool").ThreadPool(self._most)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def call() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._pool.spawn(call)
        return future


def blocking_executor(most: int) -> concurrent.futures.Executor | None:
    """An executor for blocking calls from the loop where the standard one does not work (gevent), else None."""
    gevent = sys.modules.get("gevent.monkey")
    return _GeventThreads(most) if gevent is not None and gevent.is_module_patched("threading") else None
