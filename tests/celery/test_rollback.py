"""The store's machine dies with its last second: the append-only file comes back from a moment earlier."""

import shutil
import threading
from pathlib import Path
from typing import Any

from agentmesh import Agent, Approve, Context, Crew, tool
from agentmesh.config import Config
from agentmesh.journal.events import ENDS, StepDone
from agentmesh.mesh import Mesh

DID: list[int] = []
REACHED, GO_ON = threading.Event(), threading.Event()


@tool
def count(number: int) -> int:
    """Counts, when it may.

    Args:
        number: which one.
    """
    REACHED.set()
    assert GO_ON.wait(30)
    DID.append(number)
    return number


class Counter(Agent[list[int]]):
    """Counts to two, and waits for a person."""

    def flow(self, task: str, ctx: Context) -> list[int]:
        counted = [ctx.do(count.on(number)) for number in (1, 2)]
        ctx.do(Approve("enough?"))
        return counted


def test_a_worker_does_not_go_on_from_what_the_store_has_lost(valkey: Any, tmp_path: Path, eventually: Any) -> None:
    """It remembers steps 1 and 2 as done; the store, back from an earlier moment, does not."""
    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=1.0, sweep_s=0.1)
    mesh = Mesh(Crew(Counter(), name="rollback"), config=config)
    kept = valkey.folder / "appendonlydir"
    with mesh.worker():
        run = mesh.start(mesh.crew.lead, "go")
        assert REACHED.wait(10)
        shutil.copytree(kept, tmp_path / "earlier")  # step 1 is claimed, nothing is done
        GO_ON.set()
        eventually(lambda: run.waiting_for())
        valkey.kill()
        shutil.rmtree(kept)
        shutil.copytree(tmp_path / "earlier", kept)
        valkey.restart()
        eventually(lambda: len(DID) == 4 and run.waiting_for())
        run.approve(run.waiting_for()[0])
        assert run.result(timeout_s=20) == [1, 2]
        events = run.events()
    mesh.close()
    assert DID == [1, 2, 1, 2]  # what the store forgot is done again
    assert [e.n for e in events if isinstance(e, StepDone)] == [1, 2]
    assert sum(isinstance(e, ENDS) for e in events) == 1
