"""A Celery worker process for the tests: counts its steps in Valkey. Run with BROKER URL CONCURRENCY GRACE_S."""

import argparse
import asyncio

import redis.asyncio
from celery import Celery, signals
from celery.apps.worker import Worker
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from agentmesh.celery.app import celery_settings
from agentmesh.celery.consumer import MeshConsumer
from agentmesh.celery.pool import TaskPool
from agentmesh.worker.process import announce_ready, exit_with_parent

AGAIN = Retry(ConstantBackoff(0.1), 100)  # the tests kill the server


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("broker", "url", "concurrency", "grace_s"):
        parser.add_argument(name)
    parser.add_argument("--worker-name", default="w")
    parser.add_argument("--ready-fd", type=int)
    given = parser.parse_args()
    if given.ready_fd is not None:
        exit_with_parent(float(given.grace_s))
    app = Celery("counting", set_as_current=False)
    app.conf.update(celery_settings(given.broker))
    TaskPool.grace_s = float(given.grace_s)
    clients = {}

    class Count(app.Task):
        name = "count"
        ignore_result = acks_late = True

        def run(self, seconds):
            raise AssertionError

        async def coro(self, seconds):
            if "it" not in clients:  # made here, on the loop that uses it
                clients["it"] = redis.asyncio.Redis.from_url(given.url, retry=AGAIN)
            client = clients["it"]
            await client.incr("begun")
            await asyncio.sleep(seconds)
            await client.incr("ended")

    app.register_task(Count())

    @signals.worker_ready.connect(weak=False)
    def ready(**_):
        if given.ready_fd is not None:
            announce_ready(given.ready_fd)

    worker = Worker(
        app=app, pool=TaskPool, consumer_cls=MeshConsumer, concurrency=int(given.concurrency), queues=["q"],
        hostname=given.worker_name.replace("/", "-") + "@here", prefetch_multiplier=1,
        without_gossip=True, without_mingle=True, without_heartbeat=True, quiet=True, loglevel="WARNING",
    )  # fmt: skip
    worker.start()
    raise SystemExit(worker.exitcode or 0)


if __name__ == "__main__":
    main()
