"""The tender's rhythm: quick while there is work, slow while there is none, woken by the first step."""

import asyncio
from typing import Any

import pytest

from agentmesh.celery import sweep
from agentmesh.celery.sweep import Tender
from agentmesh.event import StepPlanned
from agentmesh.journal import Swept
from agentmesh.journals.memory import MemoryJournal
from agentmesh.ports import Next, Plan, RunSpec, Wire


class Watched(MemoryJournal):
    """Keeps what its sweeps answered."""

    def __init__(self) -> None:
        super().__init__()
        self.swept: list[Swept] = []

    async def sweep(self, worker: str, **options: Any) -> Swept:
        self.swept.append(await super().sweep(worker, **options))
        return self.swept[-1]


@pytest.fixture
def journal() -> Watched:
    return Watched()


@pytest.fixture
def tender(journal: Watched, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sweep, "IDLE", 3_000)
    monkeypatch.setattr("agentmesh.journals.tend.REST_MS", 90_000)
    made = Tender(engines=[], journal=journal, worker="w", queues=["q"], lengths=None, ttl_s=600.0, sweep_s=0.02)
    yield made
    made.stop()


def begin(journal: Watched) -> None:
    planned = Plan(StepPlanned(n=1, kind="Call", name="f", digest="d"), "queued", Wire("q", "s|r|1#", ""))
    spec = RunSpec("r", "c", "", "A", "t", wire=Wire("q", "a|r#", ""))
    asyncio.run(journal.begin(spec, Next([planned])))


def test_it_rests_until_the_first_step_comes(journal: Watched, tender: Tender, eventually: Any) -> None:
    tender.start()
    eventually(lambda: tender._idle)
    assert journal.swept == [Swept(0, 90_000)]
    begin(journal)
    tender.stir()
    eventually(lambda: len(journal.swept) >= 5)
    assert {swept.rest_ms for swept in journal.swept[1:]} == {0}


def test_it_waits_for_its_turn_while_another_sweeps(journal: Watched, tender: Tender, eventually: Any) -> None:
    begin(journal)
    asyncio.run(MemoryJournal.sweep(journal, "other"))  # whose turn lasts 3 s
    tender.start()
    eventually(lambda: journal.swept)
    tender.stir()
    eventually(lambda: journal.swept[-1].mine)
    assert len(journal.swept) <= 3
