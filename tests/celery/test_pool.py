"""One loop per worker process: hundreds in flight, acks at the end, failures reported, drained on SIGTERM."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis
from celery import Celery
from celery.app.defaults import DEFAULTS
from celery.result import AsyncResult
from celery.worker import state

from agentmesh.celery.app import celery_settings
from agentmesh.celery.embedded import EmbeddedWorker
from agentmesh.celery.event_loop import loop_of_this_process, run_sync

IN_FLIGHT = 300


@pytest.fixture
def app(valkey):
    app = Celery("pool", set_as_current=False)
    app.conf.update(celery_settings(valkey.broker_url))
    yield app
    app.close()


@pytest.fixture
def worker(app):
    worker = EmbeddedWorker(app, queues=["q"], concurrency=IN_FLIGHT)
    yield worker
    worker.stop(grace_s=0.0)


def stepping(app, coro, name="step"):
    """A task whose coroutine is `coro`."""
    kind = type("Step", (app.Task,), {
        "name": name, "ignore_result": True, "acks_late": True, "coro": staticmethod(coro),
        "run": lambda self, *a, **k: pytest.fail("the pool has to await `coro`"),
    })  # fmt: skip
    return app.register_task(kind())


def in_flight():
    return len(state.reserved_requests)


def test_hundreds_of_coroutines_are_in_flight_at_once(app, worker, eventually):
    together, gate = set(), asyncio.Event()

    async def step(x):
        together.add(x)
        if len(together) == IN_FLIGHT:
            gate.set()
        await gate.wait()
        ended.append(x)

    ended: list[int] = []
    task = stepping(app, step)
    for x in range(IN_FLIGHT):
        task.apply_async((x,), queue="q")
    worker.start()
    eventually(lambda: len(ended) == IN_FLIGHT)
    assert sorted(ended) == list(range(IN_FLIGHT))


def test_no_more_are_taken_than_the_concurrency(app, valkey, eventually):
    begun, gate = [], asyncio.Event()

    async def step(x):
        begun.append(x)
        await gate.wait()

    task = stepping(app, step)
    for x in range(20):
        task.apply_async((x,), queue="q")
    worker = EmbeddedWorker(app, queues=["q"], concurrency=5)
    worker.start()
    try:
        with redis.Redis.from_url(valkey.url) as client:
            eventually(lambda: len(begun) == 5)
            assert client.llen("q") == 15
            loop_of_this_process().call_soon_threadsafe(gate.set)
            eventually(lambda: len(begun) == 20)
            assert client.llen("q") == 0
            assert not client.exists("unacked")
    finally:
        worker.stop()


def test_keyword_arguments_and_plain_tasks_arrive_too(app, worker, eventually):
    seen = []

    async def step(x, *, y):
        seen.append(("coro", x, y, threading.current_thread().name))

    @app.task(shared=False, name="plain")
    def plain(x):
        seen.append(("plain", x, plain.app is app, threading.current_thread() is threading.main_thread()))

    task = stepping(app, step)
    worker.start()
    task.apply_async((1,), {"y": 2}, queue="q")
    plain.apply_async((3,), queue="q")
    eventually(lambda: len(seen) == 2)
    assert sorted(seen) == [("coro", 1, 2, "agentmesh-loop"), ("plain", 3, True, False)]


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), asyncio.CancelledError()])
def test_a_coroutine_that_raises_ends_alone(app, worker, eventually, error, caplog):
    seen = []

    async def step(x):
        if x == 0:
            raise error
        seen.append(x)

    task = stepping(app, step)
    worker.start()
    for x in range(3):
        task.apply_async((x,), queue="q")
    eventually(lambda: sorted(seen) == [1, 2] and in_flight() == 0)
    assert "task step raised" in caplog.text


def test_events_carry_the_exception_itself(app, worker, eventually):
    async def step():
        raise ValueError("boom")

    task = stepping(app, step)
    app.conf.worker_send_task_events = True
    heard = []
    worker.start()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-failed": heard.append})
        listening = receiver.itercapture(limit=None, timeout=10, wakeup=False)
        next(listening)  # the consumer is declared
        task.apply_async(queue="q")
        for _ in listening:
            if heard:
                break
    assert heard[0]["exception"] == "ValueError('boom')"


def test_revoke_with_terminate_cancels_the_coroutine(app, worker, eventually):
    began, cancelled = threading.Event(), threading.Event()

    async def step():
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    task = stepping(app, step)
    worker.start()
    result: AsyncResult = task.apply_async(queue="q")
    assert began.wait(10)
    app.control.revoke(result.id, terminate=True)
    assert cancelled.wait(10)
    eventually(lambda: in_flight() == 0)


def test_drive_runs_a_coroutine_for_a_caller_without_a_loop():
    async def twice(x):
        await asyncio.sleep(0)
        return 2 * x, asyncio.get_running_loop()

    assert run_sync(twice(2)) == (4, loop_of_this_process())

    async def nested():
        return run_sync(twice(1))

    with pytest.raises(RuntimeError, match="await the coroutine instead"):
        run_sync(nested())


def started(valkey, *, concurrency=200, grace_s=20.0):
    script = Path(__file__).with_name("counting_worker.py")
    argv = [sys.executable, str(script), valkey.broker_url, valkey.url, str(concurrency), str(grace_s)]
    return subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})


def ask(valkey, count, seconds):
    with Celery("ask", set_as_current=False, broker=valkey.broker_url) as app:
        for _ in range(count):
            app.send_task("count", (seconds,), queue="q")


def test_sigterm_drains_all_that_is_in_flight(valkey, eventually):
    ask(valkey, 100, 1.0)
    worker = started(valkey)
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        eventually(lambda: client.get("begun") == "100")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        assert client.get("ended") == "100"


@pytest.mark.parametrize(("number", "grace_s"), [(signal.SIGTERM, 0.2), (signal.SIGQUIT, 20.0)])
def test_what_does_not_end_in_time_is_cancelled(valkey, eventually, number, grace_s):
    ask(valkey, 20, 600.0)
    worker = started(valkey, grace_s=grace_s)
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        eventually(lambda: client.get("begun") == "20")
        worker.send_signal(number)
        worker.wait(20)
        assert client.get("ended") is None


def test_a_worker_outlives_its_broker(valkey, eventually):
    ask(valkey, 10, 1.0)
    worker = started(valkey)
    try:
        with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
            eventually(lambda: client.get("begun") == "10")
            valkey.kill()
            valkey.restart()
            ask(valkey, 10, 0.0)
            eventually(lambda: client.get("ended") == "20")
            assert worker.poll() is None
    finally:
        worker.terminate()
        worker.wait(20)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis+socket:///a/v.sock?virtual_host=0", {"ack_emulation": False, "socket_keepalive": True}),
        ("rediss://:secret@host:6380/1", {"ack_emulation": False, "socket_keepalive": True}),
        ("amqp://host//", {"confirm_publish": True}),
        ("memory://", {}),
    ],
)
def test_settings_are_celerys_own_words(url, options):
    given = celery_settings(url)
    assert set(given) <= set(DEFAULTS)
    assert given["broker_transport_options"] == options
    assert given["accept_content"] == ["json"]
