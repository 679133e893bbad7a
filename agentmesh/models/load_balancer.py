"""Several OpenAI-compatible servers as one Model: least in flight first, the unhealthy ones out until they answer again."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from agentmesh.definitions.queue import Servers
from agentmesh.errors import ModelError
from agentmesh.model import Answer, Prompt, RetryLater
from agentmesh.models.address import key_of
from agentmesh.models.http import HttpModel, TransientFailure

log = logging.getLogger("agentmesh.models")

HEALTH_CHECK_S = 2.0  # how often servers are looked at while anything is asked
HEALTH_TIMEOUT_S = 5.0  # how long a look may take: a server with its hands full may be slow to say so
MAX_MISSES = 3  # looks in a row without an answer, after which what the server has in hand is given up
RETRY_UNAVAILABLE_S = 5.0  # when a question is put again that no server could take


@dataclass(slots=True, eq=False)
class _Server:
    """A server as this process sees it."""

    model: HttpModel
    in_flight: int = 0
    last: int = 0  # when it was last chosen, as a count
    unhealthy_reason: str = ""  # why it is out
    refuses: str = ""  # that it has another model or key, once that was said
    missed: int = 0
    given_up: "asyncio.Future[None] | None" = None  # done when what it has in hand is given up


class LoadBalancer:
    """A Model in front of servers that all know the same models.

    A question that a server never took goes to another at once. One that was cut off is the journal's to retry, and goes
    to another then: so a prompt that kills servers kills no more of them than its step has retries.

    Raises:
        ConfigError: the variable that should hold the key is empty.
    """

    def __init__(self, servers: Servers) -> None:
        self._urls, self._key = servers.urls, key_of(servers)
        self._set_by = "the queue's urls", servers.key_env or "the queue's key_env"
        self._views: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopView] = WeakKeyDictionary()

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See Model."""
        return await self._view().ask(prompt, on_token)

    async def check_servers(self) -> dict[str, str]:
        """Each server's URL, and why it cannot be asked now, or nothing."""
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
        self.servers = [_Server(model) for model in models]
        self._turns = itertools.count(1)
        self._asking = 0
        self._looking: asyncio.Task[None] | None = None
        self._look: asyncio.Task[None] | None = None

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None) -> Answer:
        self._asking += 1
        try:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._check_periodically())
            return await self._ask(prompt, on_token)
        finally:
            self._asking -= 1

    async def _ask(self, prompt: Prompt, on_token: Callable[[str], None] | None) -> Answer:
        tried: list[_Server] = []
        waits: list[float] = []
        refused: dict[str, ModelError] = {}
        while (server := await self._next(tried)) is not None:
            tried.append(server)
            try:
                return await self._put(server, prompt, on_token)
            except TransientFailure as e:
                if e.elsewhere:
                    _note_refusal(server, str(e.error))
                    refused[server.model.base_url] = e.error
                    continue
                if e.down:
                    _note_health(server, str(e.error))
                if e.said or (e.down and e.sent):
                    raise RetryLater(e.error, 0.0) from None
                waits.append(RETRY_UNAVAILABLE_S if e.after_s is None else e.after_s)
                failed = e.error
        if len(refused) == len(self.servers):
            raise refused.popitem()[1]
        if waits and not all(s.unhealthy_reason for s in self.servers):
            raise RetryLater(failed, min(waits)) from None
        why = {s.model.base_url: s.unhealthy_reason for s in self.servers if s.unhealthy_reason} | refused
        reasons = "; ".join(f"{url}: {one}" for url, one in why.items())
        raise RetryLater(
            ModelError(f"none of {len(self.servers)} model servers responds ({reasons})", hint="start one"),
            RETRY_UNAVAILABLE_S,
            away=True,
        )

    async def _next(self, tried: list[_Server]) -> _Server | None:
        """The healthy one with the least in flight, of equals the one that has rested longest."""
        if all(
            s.unhealthy_reason for s in self.servers
        ):  # a connection may break off for less; whoever asks now looks together
            if self._look is None or self._look.done():
                self._look = asyncio.create_task(self.check_health())
            await asyncio.shield(self._look)
        able = [s for s in self.servers if not s.unhealthy_reason and s not in tried]
        return min(able, key=lambda s: (s.in_flight, s.last)) if able else None

    async def _put(self, server: _Server, prompt: Prompt, on_token: Callable[[str], None] | None) -> Answer:
        """The server's answer, unless it is given up before it comes."""
        if server.given_up is None:
            server.given_up = asyncio.get_running_loop().create_future()
        server.in_flight += 1
        server.last = next(self._turns)
        has_answered = False

        def tell(text: str) -> None:
            nonlocal has_answered
            has_answered = True
            if on_token is not None:
                on_token(text)

        request = asyncio.ensure_future(server.model.once(prompt, tell if on_token is not None else None))
        try:
            ends: list[asyncio.Future[Any]] = [request, server.given_up]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                return request.result()
            failure = TransientFailure(
                ModelError(f"{server.model.base_url} was given up while it worked: {server.unhealthy_reason}"),
                down=True,
            )
            failure.said = has_answered
            raise failure
        finally:
            server.in_flight -= 1
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    # ---- health --------------------------------------------------------------------------------
    async def _check_periodically(self) -> None:
        while self._asking:
            await self.check_health()
            await asyncio.sleep(HEALTH_CHECK_S)

    async def check_health(self) -> None:
        await asyncio.gather(*[self._check_server(s) for s in self.servers])

    async def _check_server(self, server: _Server) -> None:
        _note_health(server, await server.model.unhealthy_reason(HEALTH_TIMEOUT_S))
        server.missed = server.missed + 1 if server.unhealthy_reason else 0
        if server.missed >= MAX_MISSES and server.given_up is not None:
            server.given_up.set_result(None)
            server.given_up = None

    async def close(self) -> None:
        looks = [task for task in (self._looking, self._look) if task is not None]
        for task in looks:
            task.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
        for server in self.servers:
            await server.model.close()


def _note_refusal(server: _Server, why: str) -> None:
    """Said once: it is asked again by every step, for whoever set it up wrong may mend that."""
    if not server.refuses:
        log.warning("model server %s is set up otherwise than others: %s", server.model.base_url, why)
    server.refuses = why


def _note_health(server: _Server, ails: str) -> None:
    """It is out or back now, or as it was."""
    if bool(ails) != bool(server.unhealthy_reason):
        log.warning("model server %s is %s", server.model.base_url, f"out: {ails}" if ails else "back")
    server.unhealthy_reason = ails
