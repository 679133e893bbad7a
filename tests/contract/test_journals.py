"""Our own journals against the contract that any journal is held to."""

import asyncio
from typing import Any

import pytest

from agentmesh.journals.memory import MemoryJournal
from agentmesh.journals.redis import RedisJournal
from agentmesh.testing.contracts import JOURNAL_PROMISES
from agentmesh.testing.servers import ValkeyServer, a_server


@pytest.fixture(scope="module")
def server() -> Any:
    with a_server(ValkeyServer) as running:
        yield running


@pytest.mark.parametrize("promise", JOURNAL_PROMISES)
def test_the_memory_journal(promise: Any) -> None:
    asyncio.run(promise(lambda clock, send: MemoryJournal(clock=clock, send=send)))


@pytest.mark.parametrize("promise", JOURNAL_PROMISES)
def test_the_redis_journal(promise: Any, server: Any) -> None:
    server.flush()
    asyncio.run(promise(lambda clock, send: RedisJournal(server.url, push=False, clock=clock, send=send)))
