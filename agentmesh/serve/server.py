"""Listens at an address until told to stop; the HTTP server is uvicorn."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from agentmesh.errors import ConfigError
from agentmesh.mesh import Mesh
from agentmesh.serve.app import Endpoint
from agentmesh.serve.auth import key_from

if TYPE_CHECKING:
    from agentmesh.rag.embedders.base import Embedder

GRACE_S = 5  # for answers in flight when the server is told to stop
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HttpServer:
    """A bound address, and the key that its clients must send.

    Args:
        port: 0 takes a free one.
        key_env: the variable that holds the key; "" for none, on loopback.

    Raises:
        ConfigError: the address cannot be bound, the variable is empty, or other machines reach the address without a key.
    """

    def __init__(self, host: str, port: int, key_env: str) -> None:
        self.key = key_from(key_env, host)
        self._socket = _bind(host, port)
        name = f"[{host.strip('[]')}]" if ":" in host else host
        self.url = f"http://{name}:{self._socket.getsockname()[1]}"

    async def serve(
        self, mesh: Mesh, *, models: Sequence[str], origin: str, health: Callable[[], tuple[bool, dict[str, Any]]],
        embedders: "Mapping[str, Embedder]", up: Callable[[], None],
    ) -> int:  # fmt: skip
        """Serve until SIGINT or SIGTERM; the signal's number, or 0.

        Args:
            models, origin, health, embedders: as Endpoint takes them.
            up: called when requests are taken.
        """
        endpoint = Endpoint(mesh, models=models, key=self.key, origin=origin, health=health, embedders=embedders)
        config = uvicorn.Config(
            endpoint.app, log_level="warning", access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )  # fmt: skip
        server, loop = _UvicornServer(config), asyncio.get_running_loop()
        signals: list[int] = []

        def stop(number: int) -> None:
            signals.append(number)
            server.should_exit, server.force_exit = True, len(signals) > 1
            endpoint.close()  # clients that wait for a run are told at once

        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            if server.started:
                up()
            await serving
            return signals[0] if signals else 0
        finally:
            await mesh.aio.close()  # this loop's connections
            for number in SIGNALS:
                loop.remove_signal_handler(number)


class _UvicornServer(uvicorn.Server):
    """Leaves signals to HttpServer."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = addresses[0]
        # TCP by its name: with proto 0, as create_server leaves it, asyncio sets no TCP_NODELAY and each stream begins 40 ms late
        sock = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1024)
        except BaseException:
            sock.close()
            raise
        return sock
    except (OSError, OverflowError) as e:
        raise ConfigError(f"cannot listen at {host}:{port} ({e})", hint="choose another --host or --port") from None
