"""The worker in a thread: ready when start returns, gone when stop does, and nothing of the process touched."""

import logging
import signal
import socket
import sys
import threading

import pytest
import redis
from celery import Celery, current_app
from celery._state import default_app
from kombu.asynchronous import get_event_loop

from agentmesh.celery.app import celery_settings
from agentmesh.celery.embedded import EmbeddedWorker
from agentmesh.errors import ServiceDown


def counting(broker_url, name="count"):
    """An app with one task, and the list it counts in."""
    app, seen = Celery(name, set_as_current=False), []
    app.conf.update(celery_settings(broker_url))

    class Count(app.Task):
        ignore_result = acks_late = True

        def run(self, x):
            raise AssertionError

        async def coro(self, x):
            seen.append(x)

    Count.name = name
    return app, app.register_task(Count()), seen


def surroundings():
    root = logging.getLogger()
    return (
        sys.stdout, sys.stderr, tuple(root.handlers), root.level, get_event_loop(), default_app, current_app.main,
        tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)),
    )  # fmt: skip


def test_it_consumes_when_started_and_is_gone_when_stopped_again_and_again(valkey, eventually):
    app, count, seen = counting(valkey.broker_url)
    before = surroundings()
    for round_ in range(3):
        worker = EmbeddedWorker(app, queues=["q"], concurrency=10)
        worker.start()
        worker.start()
        assert worker.running
        count.apply_async((round_,), queue="q")
        eventually(lambda: len(seen) == round_ + 1)  # noqa: B023
        worker.stop()
        worker.stop()
        assert not worker.running
    assert surroundings() == before
    assert not [t.name for t in threading.enumerate() if t.name == "agentmesh-worker"]


def test_one_that_is_told_to_stop_asks_the_broker_for_nothing_more(valkey, eventually):
    app, _, _ = counting(valkey.broker_url)
    with redis.Redis.from_url(valkey.url) as client:

        def pops():
            return client.info("commandstats").get("cmdstat_blmpop", {"calls": 0})["calls"]

        worker = EmbeddedWorker(app, queues=["q"])
        worker.start()
        eventually(lambda: any("b" in c["flags"] for c in client.client_list()))
        before = pops()
        worker.stop()
        assert pops() <= before + 1  # one may have been on its way


def test_two_workers_of_two_apps_live_side_by_side(valkey, eventually):
    one_app, one, of_one = counting(valkey.broker_url, "one")
    other_app, other, of_other = counting(valkey.broker_url, "other")
    first, second = EmbeddedWorker(one_app, queues=["a"]), EmbeddedWorker(other_app, queues=["b"])
    first.start()
    second.start()
    try:
        one.apply_async((1,), queue="a")
        other.apply_async((2,), queue="b")
        eventually(lambda: (of_one, of_other) == ([1], [2]))
        first.stop()
        other.apply_async((3,), queue="b")
        one.apply_async((4,), queue="a")
        eventually(lambda: of_other == [2, 3])
        assert of_one == [1]
    finally:
        first.stop()
        second.stop()


@pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")  # Celery's own backend, on redis-py 8
def test_a_user_may_wait_for_results_beside_it(valkey):
    app, _, _ = counting(valkey.broker_url)
    app.conf.update(result_backend=valkey.url.replace("unix://", "redis+socket://"))

    @app.task(shared=False, ignore_result=False)
    def add(x, y):
        return x + y

    worker = EmbeddedWorker(app, queues=["q"])
    worker.start()
    try:
        assert add.apply_async((1, 2), queue="q").get(timeout=10) == 3
    finally:
        worker.stop()
        app.close()
        app.backend.client.close()


def test_it_goes_on_when_the_broker_comes_back(valkey, eventually):
    app, count, seen = counting(valkey.broker_url)
    worker = EmbeddedWorker(app, queues=["q"])
    worker.start()
    try:
        valkey.kill()
        valkey.restart()
        count.apply_async((1,), queue="q", retry=True)
        eventually(lambda: seen == [1])
    finally:
        worker.stop()


def test_two_workers_of_an_app_have_their_own_queues_again_when_the_broker_comes_back(valkey, eventually):
    app, count, seen = counting(valkey.broker_url)
    workers = [EmbeddedWorker(app, queues=[queue]) for queue in ("p", "q")]
    for worker in workers:
        worker.start()
    try:
        valkey.kill()
        valkey.restart()
        for n, queue in enumerate(("p", "q")):
            count.apply_async((n,), queue=queue, retry=True)
        eventually(lambda: sorted(seen) == [0, 1])
    finally:
        for worker in workers:
            worker.stop()


def test_it_stops_while_the_broker_is_away(valkey):
    app, _, _ = counting(valkey.broker_url)
    worker = EmbeddedWorker(app, queues=["q"])
    worker.start()
    valkey.kill()
    worker.stop()
    assert not worker.running


def test_a_broker_that_does_not_answer_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused
        app, _, _ = counting(f"redis://127.0.0.1:{taken.getsockname()[1]}/0")
        with pytest.raises(ServiceDown, match=r"no broker responds at redis://127\.0\.0\.1:\d+/0 .*refused"):
            EmbeddedWorker(app, queues=["q"]).start()
