"""One asyncio loop thread per process, and a way for synchronous code to run a coroutine on it; knows no Celery."""

import asyncio
import importlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# One loop per process id: a forked child finds no entry of its own and makes a new loop and thread.
_LOOPS: dict[int, tuple[asyncio.AbstractEventLoop, threading.Thread]] = {}


def loop_of_this_process() -> asyncio.AbstractEventLoop:
    """The loop that runs on this process's daemon thread; made at first use, never closed."""
    pid = os.getpid()
    held = _LOOPS.get(pid)
    if held is None:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_turn, args=(loop,), name="agentmesh-loop", daemon=True)
        held = _LOOPS.setdefault(pid, (loop, thread))  # atomic: of two threads that get here one wins, without a lock
        if held[0] is loop:
            thread.start()
        else:
            loop.close()
    return held[0]


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def drive(coro: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns, for a caller without a loop: a client, or a task on any pool but ours.

    Raises:
        RuntimeError: called on the loop's own thread, which would wait for itself for ever.
    """
    native = _native_threads()
    if native is not None:
        # Under gevent and eventlet `threading` is greenlets, which share one running loop; a native thread has its own.
        value: T = native(lambda: asyncio.run(coro))
        return value
    loop = loop_of_this_process()
    if threading.current_thread() is _LOOPS[os.getpid()][1]:
        coro.close()
        raise RuntimeError("drive() was called on the event loop's own thread; await the coroutine instead")
    future = asyncio.run_coroutine_threadsafe(coro, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C of the caller; does nothing to one that is done
        raise


def _native_threads() -> Callable[[Callable[[], Any]], Any] | None:
    """The way to a native thread where `threading` is patched, else None.

    Asks sys.modules only: importing eventlet just to ask leaves a worker that never ends.
    """
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        pool: Callable[[Callable[[], Any]], Any] = sys.modules["gevent"].get_hub().threadpool.apply
        return pool
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        execute: Callable[[Callable[[], Any]], Any] = importlib.import_module("eventlet.tpool").execute
        return execute
    return None
