"""Our own journals keep the contract that the public kit holds against anybody's; and it finds one that does not."""

from collections.abc import Iterator
from typing import Any

import pytest

from agentmesh.journal.memory import MemoryJournal
from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.types import Accepted
from agentmesh.testing import ValkeyServer
from agentmesh.testing.contracts import JOURNAL, LEASE_MS, JournalContract, check_journal
from agentmesh.testing.servers import running_server


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with running_server(ValkeyServer) as server:
        yield server


class TestMemoryJournal(JournalContract):
    def make(self) -> MemoryJournal:
        return MemoryJournal(ttl_ms=LEASE_MS)


class TestRedisJournal(JournalContract):
    @pytest.fixture(autouse=True)
    def server(self, valkey: ValkeyServer) -> None:
        self.url = valkey.url
        valkey.flush()

    def make(self) -> RedisJournal:
        return RedisJournal(self.url, ttl_ms=LEASE_MS)


def test_each_promise_is_a_test() -> None:
    assert JournalContract.promises() == sorted(f"test_{promise.__name__}" for promise in JOURNAL)


def test_a_journal_that_takes_any_fence_is_found() -> None:
    class Unfenced(MemoryJournal):
        async def commit(self, unit: str, **how: Any) -> Any:
            await super().commit(unit, **how)
            return Accepted(0)

    with pytest.raises(AssertionError) as found:
        check_journal(lambda: Unfenced(ttl_ms=LEASE_MS))
    assert "found by JournalContract.test_" in found.value.__notes__[0]
