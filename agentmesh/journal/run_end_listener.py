"""Ends of runs, as the server publishes them: one subscription of an event loop for all who wait.

Source: https://valkey.io/commands/subscribe/
"""

import asyncio
import time
from contextlib import suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

from agentmesh.journal.redis_connection import CONNECTION_LOST, cancel_and_wait, start_task

SUBSCRIBE_S = 5.0  # how long a caller waits for the subscription; after that it polls
RECONNECT_S = 0.1
IDLE_S = 10.0  # a subscription that nobody has used for so long ends: its mesh may be gone without having been closed


class RunEndListener:
    """Resolves futures when runs end."""

    def __init__(self, url: str, channel: str) -> None:
        self._url, self._channel = url, channel
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._subscribed = asyncio.Event()

    async def subscribe(self, run_id: str) -> "asyncio.Future[None]":
        """A future that is done when the run ends, or when its end may have been missed: its owner must look.

        When this returns the subscription stands, unless the server has been unreachable for SUBSCRIBE_S.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(run_id, []).append(future)
        if self._task is None or self._task.done():
            self._subscribed.clear()
            self._task = start_task(self._listen())
        if not self._subscribed.is_set():
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with what it waits for.
            with suppress(TimeoutError):
                async with asyncio.timeout(SUBSCRIBE_S):
                    await self._subscribed.wait()
        return future

    def leave(self, run_id: str, future: "asyncio.Future[None]") -> None:
        """Nobody waits on this future any more."""
        futures = self._waiting.get(run_id, [])
        if future in futures:
            futures.remove(future)
        if not futures:
            self._waiting.pop(run_id, None)

    async def _listen(self) -> None:
        idle = False
        while not idle:
            client: Redis = Redis.from_url(self._url, decode_responses=True)
            try:
                async with client.pubsub() as subscription:
                    await subscription.subscribe(self._channel)
                    used_s = time.monotonic()
                    while not idle:
                        message = await subscription.get_message(timeout=IDLE_S)
                        now_s = time.monotonic()
                        if self._waiting:
                            used_s = now_s
                        elif now_s - used_s >= IDLE_S:
                            self._task, idle = None, True  # who comes from now on subscribes anew
                        if message is None:
                            continue
                        if message["type"] == "subscribe":
                            if self._subscribed.is_set():  # redis-py has connected again without a word
                                self._notify_all()
                            self._subscribed.set()
                        elif message["type"] == "message":
                            self._notify(message["data"])
            except (*CONNECTION_LOST, RedisError):
                await asyncio.sleep(RECONNECT_S)
                self._notify_all()
            finally:
                await client.aclose()

    def _notify_all(self) -> None:
        """Ends may have been missed."""
        for run_id in list(self._waiting):
            self._notify(run_id)

    def _notify(self, run_id: str) -> None:
        for future in self._waiting.pop(run_id, []):
            if not future.done():
                future.set_result(None)

    async def close(self) -> None:
        """Close the connection; futures stay as they are."""
        await cancel_and_wait(self._task)
