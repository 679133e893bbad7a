"""Ends of runs, as the server publishes them: one subscription of an event loop for all who wait."""

import asyncio
from contextlib import suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

from agentmesh.journal.redis_connection import CONNECTION_LOST, cancel_and_wait

SUBSCRIBE_S = 5.0  # how long one who waits waits for the subscription; then it looks for itself every few seconds


class RunEndListener:
    """Hears of ended runs: one subscription an event loop, whoever waits."""

    def __init__(self, url: str, channel: str) -> None:
        self._url, self._channel = url, channel
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()

    async def of(self, run_id: str) -> "asyncio.Future[None]":
        """A future that is done when the run ends, or when its end may have been missed; heard from when this returns."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(run_id, []).append(future)
        if self._task is None or self._task.done():
            self._heard.clear()
            self._task = asyncio.create_task(self._listen())
        if not self._heard.is_set():
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with what it waits for.
            with suppress(TimeoutError):  # the server is away; the asker looks for itself every few seconds
                async with asyncio.timeout(5):
                    await self._heard.wait()
        return future

    def leave(self, run_id: str, future: "asyncio.Future[None]") -> None:
        """Nobody waits on this future any more."""
        futures = self._waiting.get(run_id, [])
        if future in futures:
            futures.remove(future)
        if not futures:
            self._waiting.pop(run_id, None)

    async def _listen(self) -> None:
        while True:
            client: Redis = Redis.from_url(self._url, decode_responses=True)
            try:
                async with client.pubsub() as subscription:
                    await subscription.subscribe(self._channel)
                    async for message in subscription.listen():
                        if message["type"] == "subscribe":
                            self._heard.set()
                        elif message["type"] == "message":
                            self._tell(message["data"])
            except (*CONNECTION_LOST, RedisError):
                await asyncio.sleep(0.1)
                for run_id in list(self._waiting):  # whoever waits looks again: ends may have gone unheard
                    self._tell(run_id)
            finally:
                await client.aclose()

    def _tell(self, run_id: str) -> None:
        for future in self._waiting.pop(run_id, []):
            if not future.done():
                future.set_result(None)

    async def close(self) -> None:
        await cancel_and_wait(self._task)
