"""The tender's rhythm: quick while there is work, slow while there is none, woken by the first step."""

import asyncio
from typing import Any

import pytest

from agentmesh.celery import housekeeping
from agentmesh.celery.housekeeping import Housekeeper
from agentmesh.journal.events import StepPlanned
from agentmesh.journal.journal import SweepResult
from agentmesh.journal.memory import MemoryJournal
from agentmesh.journal.run_spec import RunSpec
from agentmesh.journal.types import NewRun, NextSteps, StepPlan, TaskMessage


class Watched(MemoryJournal):
    """Keeps what its sweeps answered."""

    def __init__(self) -> None:
        super().__init__()
        self.swept: list[SweepResult] = []

    async def sweep(self, worker: str, **options: Any) -> SweepResult:
        self.swept.append(await super().sweep(worker, **options))
        return self.swept[-1]


@pytest.fixture
def journal() -> Watched:
    return Watched()


@pytest.fixture
def tender(journal: Watched, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(housekeeping, "IDLE_FACTOR", 3_000)
    monkeypatch.setattr("agentmesh.journal.maintenance.MAX_IDLE_MS", 90_000)
    made = Housekeeper(engines=[], journal=journal, worker="w", queues=["q"], lengths=None, ttl_s=600.0, sweep_s=0.02)
    yield made
    made.stop()


def begin(journal: Watched) -> None:
    planned = StepPlan(StepPlanned(n=1, kind="Call", name="f", digest="d"), "queued", TaskMessage("q", "s|r|1#", ""))
    new = NewRun("r", RunSpec(crew="c", agent="A", task="t"), TaskMessage("q", "a|r#", ""))
    asyncio.run(journal.begin(new, NextSteps([planned])))


def test_it_rests_until_the_first_step_comes(journal: Watched, tender: Housekeeper, eventually: Any) -> None:
    tender.start()
    eventually(lambda: tender._idle)
    assert journal.swept == [SweepResult(0, 90_000)]
    begin(journal)
    tender.wake()
    eventually(lambda: len(journal.swept) >= 5)
    assert {swept.rest_ms for swept in journal.swept[1:]} == {0}


def test_it_waits_for_its_turn_while_another_sweeps(journal: Watched, tender: Housekeeper, eventually: Any) -> None:
    begin(journal)
    asyncio.run(MemoryJournal.sweep(journal, "other"))  # whose turn lasts 3 s
    tender.start()
    eventually(lambda: journal.swept)
    tender.wake()
    eventually(lambda: journal.swept[-1].mine)
    assert len(journal.swept) <= 3
