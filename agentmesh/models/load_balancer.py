"""Several OpenAI-compatible servers as one Model: the one with the least in flight first; unhealthy ones wait for a health check."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from agentmesh.address import key_of_servers
from agentmesh.definitions.queue import Servers
from agentmesh.errors import ModelError
from agentmesh.model import Answer, Model, Prompt, RetryLater
from agentmesh.models.http import HttpModel, TransientFailure

log = logging.getLogger("agentmesh.models")

HEALTH_CHECK_S = 2.0  # between two health checks while any request is in flight
HEALTH_TIMEOUT_S = 5.0  # of one health check: a busy server may be slow to answer it
MAX_MISSES = 3  # failed health checks in a row, after which the requests in flight at the server are given up
RETRY_UNAVAILABLE_S = 5.0  # until a request is retried that no server could take


@dataclass(slots=True, eq=False)
class _ServerState:
    """A server as this process sees it."""

    model: HttpModel
    in_flight: int = 0
    last_turn: int = 0  # when it was last chosen, as a count
    unhealthy_reason: str = ""  # "" while it is healthy
    wrong_server_reason: str = ""  # that it has another model or key, once that was logged
    misses: int = 0  # failed health checks in a row
    given_up: "asyncio.Future[None] | None" = None  # done when the requests in flight are given up


class LoadBalancer(Model):
    """A Model in front of servers that all have the same models.

    A request that a server never received goes to another at once. One that was cut off is retried as a step, on another
    server: so a prompt that crashes servers crashes no more of them than its step has retries.

    Raises:
        ConfigError: the variable that should hold the key is empty.
    """

    def __init__(self, servers: Servers) -> None:
        super().__init__()
        self._urls, self._key = servers.urls, key_of_servers(servers.key_env, servers.urls)
        self._set_by = "the queue's urls", servers.key_env or "the queue's key_env"
        self._views: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopView] = WeakKeyDictionary()

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See Model."""
        return await self._view().ask(prompt, on_token)

    async def check_servers(self) -> dict[str, str]:
        """Each server's URL, and why it cannot be asked now, or ""."""
        view = self._view()
        await view.check_health()
        return {s.model.base_url: s.unhealthy_reason for s in view.servers}

    def _view(self) -> "_LoopView":
        loop = asyncio.get_running_loop()
        if loop not in self._views:
            models = [HttpModel(base_url=url, api_key=self._key, set_by=self._set_by) for url in self._urls]
            self._views[loop] = _LoopView(models)
        return self._views[loop]

    async def close(self) -> None:
        """See Model."""
        view = self._views.pop(asyncio.get_running_loop(), None)
        if view is not None:
            await view.close()


class _LoopView:
    """The servers as one event loop sees them."""

    def __init__(self, models: list[HttpModel]) -> None:
        self.servers = [_ServerState(model) for model in models]
        self._turns = itertools.count(1)
        self._in_flight = 0
        self._periodic_check: asyncio.Task[None] | None = None
        self._check_of_all: asyncio.Task[None] | None = None

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None) -> Answer:
        self._in_flight += 1
        try:
            if self._periodic_check is None or self._periodic_check.done():
                self._periodic_check = asyncio.create_task(self._check_periodically())
            return await self._ask(prompt, on_token)
        finally:
            self._in_flight -= 1

    async def _ask(self, prompt: Prompt, on_token: Callable[[str], None] | None) -> Answer:
        tried: list[_ServerState] = []
        waits: list[float] = []
        wrong_servers: dict[str, ModelError] = {}
        while (server := await self._next(tried)) is not None:
            tried.append(server)
            try:
                return await self._send(server, prompt, on_token)
            except TransientFailure as e:
                if e.wrong_server:
                    _note_wrong_server(server, str(e.error))
                    wrong_servers[server.model.base_url] = e.error
                    continue
                if e.disconnected:
                    _note_health(server, str(e.error))
                if e.has_answered or (e.disconnected and e.was_sent):
                    raise RetryLater(e.error, 0.0) from None
                waits.append(RETRY_UNAVAILABLE_S if e.after_s is None else e.after_s)
                last_error = e.error
        if len(wrong_servers) == len(self.servers):
            raise wrong_servers.popitem()[1]
        if waits and not all(s.unhealthy_reason for s in self.servers):
            raise RetryLater(last_error, min(waits)) from None
        unhealthy = {s.model.base_url: s.unhealthy_reason for s in self.servers if s.unhealthy_reason}
        reasons = "; ".join(f"{url}: {reason}" for url, reason in (unhealthy | wrong_servers).items())
        raise RetryLater(
            ModelError(f"none of {len(self.servers)} model servers responds ({reasons})", hint="start one"),
            RETRY_UNAVAILABLE_S,
            away=True,
        )

    async def _next(self, tried: list[_ServerState]) -> _ServerState | None:
        """The healthy server with the least in flight; of equals the one that was chosen longest ago."""
        if all(s.unhealthy_reason for s in self.servers):  # one check for all requests that find none healthy
            if self._check_of_all is None or self._check_of_all.done():
                self._check_of_all = asyncio.create_task(self.check_health())
            await asyncio.shield(self._check_of_all)
        healthy = [s for s in self.servers if not s.unhealthy_reason and s not in tried]
        return min(healthy, key=lambda s: (s.in_flight, s.last_turn)) if healthy else None

    async def _send(self, server: _ServerState, prompt: Prompt, on_token: Callable[[str], None] | None) -> Answer:
        """The server's answer, unless it is given up before it comes."""
        if server.given_up is None:
            server.given_up = asyncio.get_running_loop().create_future()
        server.in_flight += 1
        server.last_turn = next(self._turns)
        has_answered = False

        def forward(text: str) -> None:
            nonlocal has_answered
            has_answered = True
            if on_token is not None:
                on_token(text)

        request = asyncio.ensure_future(server.model.once(prompt, forward if on_token is not None else None))
        try:
            ends: list[asyncio.Future[Any]] = [request, server.given_up]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                return request.result()
            failure = TransientFailure(
                ModelError(f"{server.model.base_url} was given up while it worked: {server.unhealthy_reason}"),
                disconnected=True,
            )
            failure.has_answered = has_answered
            raise failure
        finally:
            server.in_flight -= 1
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    # ---- health --------------------------------------------------------------------------------
    async def _check_periodically(self) -> None:
        while self._in_flight:
            await self.check_health()
            await asyncio.sleep(HEALTH_CHECK_S)

    async def check_health(self) -> None:
        await asyncio.gather(*[self._check_server(s) for s in self.servers])

    async def _check_server(self, server: _ServerState) -> None:
        _note_health(server, await server.model.unhealthy_reason(HEALTH_TIMEOUT_S))
        server.misses = server.misses + 1 if server.unhealthy_reason else 0
        if server.misses >= MAX_MISSES and server.given_up is not None:
            server.given_up.set_result(None)
            server.given_up = None

    async def close(self) -> None:
        checks = [task for task in (self._periodic_check, self._check_of_all) if task is not None]
        for task in checks:
            task.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        for server in self.servers:
            await server.model.close()


def _note_wrong_server(server: _ServerState, reason: str) -> None:
    """Log it once. Later requests try the server again, for its setup may have been corrected."""
    if not server.wrong_server_reason:
        log.warning("model server %s is set up otherwise than others: %s", server.model.base_url, reason)
    server.wrong_server_reason = reason


def _note_health(server: _ServerState, unhealthy_reason: str) -> None:
    """Keep it, and log a change."""
    if bool(unhealthy_reason) != bool(server.unhealthy_reason):
        state = f"unhealthy: {unhealthy_reason}" if unhealthy_reason else "healthy again"
        log.warning("model server %s is %s", server.model.base_url, state)
    server.unhealthy_reason = unhealthy_reason
