"""Our own journals keep the contract that the public kit holds against anybody's; and it finds one that does not."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from agentmesh.journal.memory import MemoryJournal
from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.types import Accepted
from agentmesh.testing import ValkeyServer, contracts
from agentmesh.testing.servers import running_server


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with running_server(ValkeyServer) as server:
        yield server


def tell(contract: contracts.Contract, journal: Any) -> None:
    async def told() -> None:
        try:
            await contract(journal)
        finally:
            await journal.close()

    asyncio.run(told())


@pytest.mark.parametrize("contract", contracts.JOURNAL, ids=lambda c: c.__name__)
def test_in_memory(contract: contracts.Contract) -> None:
    tell(contract, MemoryJournal(ttl_ms=contracts.LEASE_MS))


@pytest.mark.parametrize("contract", contracts.JOURNAL, ids=lambda c: c.__name__)
def test_in_valkey(contract: contracts.Contract, valkey: ValkeyServer) -> None:
    valkey.flush()
    tell(contract, RedisJournal(valkey.url, ttl_ms=contracts.LEASE_MS))


def test_a_journal_that_takes_any_fence_is_found() -> None:
    class Unfenced(MemoryJournal):
        async def commit(self, unit: str, **how: Any) -> Any:
            await super().commit(unit, **how)
            return Accepted(0)

    with pytest.raises(AssertionError):
        tell(contracts.commit_is_repeatable_and_fenced, Unfenced(ttl_ms=contracts.LEASE_MS))
