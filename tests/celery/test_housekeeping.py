"""The housekeeper's interval: short while there is work, long while there is none, ended by the first step."""

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
def housekeeper(journal: Watched, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(housekeeping, "IDLE_FACTOR", 3_000)
    monkeypatch.setattr("agentmesh.journal.maintenance.MAX_IDLE_MS", 90_000)
    made = Housekeeper(engines=[], journal=journal, worker="w", queues=["q"], lengths=None, ttl_s=600.0, sweep_s=0.02)
    yield made
    made.stop()


def begin(journal: Watched) -> None:
    planned = StepPlan(StepPlanned(n=1, kind="Call", name="f", digest="d"), "queued", TaskMessage("q", "s|r|1#", ""))
    new = NewRun("r", RunSpec(crew="c", agent="A", task="t"), TaskMessage("q", "a|r#", ""))
    asyncio.run(journal.begin(new, NextSteps([planned])))


def test_it_rests_until_the_first_step_comes(journal: Watched, housekeeper: Housekeeper, eventually: Any) -> None:
    housekeeper.start()
    eventually(lambda: housekeeper._idle)
    assert journal.swept == [SweepResult(0, 90_000)]
    begin(journal)
    housekeeper.wake()
    eventually(lambda: len(journal.swept) >= 5)
    assert {swept.rest_ms for swept in journal.swept[1:]} == {0}


def test_it_waits_for_its_turn_while_another_sweeps(
    journal: Watched, housekeeper: Housekeeper, eventually: Any
) -> None:
    begin(journal)
    asyncio.run(MemoryJournal.sweep(journal, "other"))  # whose turn lasts 3 s
    housekeeper.start()
    eventually(lambda: journal.swept)
    housekeeper.wake()
    eventually(lambda: journal.swept[-1].mine)
    assert len(journal.swept) <= 3
