"""A server that listens on loopback, on an event loop in a thread of its own."""

import asyncio
import threading
from typing import Self


class LoopbackServer:
    """Made in a `with`; a kind gives `_listen` and `_close_links`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _listen(self) -> asyncio.Server:
        """Begin; on the loop."""
        raise NotImplementedError

    def _close_links(self) -> None:
        """End every connection that is open."""
        raise NotImplementedError

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(self._listen())
        self._up.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            self._close_links()
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            self._loop.close()
