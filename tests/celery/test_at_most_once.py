"""32 kills of workers inside at_most_once tools: no tool is called twice, and each that may have been called is blocked in doubt."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmesh.cli.runs import show_run
from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.engine.async_run import Approval
from agentmesh.engine.run import Run
from agentmesh.journal.events import StepInDoubt
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import WorkerProcess

CREW = str(Path(__file__).parent / "once.py")
KILLS = 32


def test_never_twice(
    valkey: Any, tmp_path: Path, eventually: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "ledger"
    book.touch()
    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=60.0, sweep_s=0.2)
    crew = load_crew(CREW)
    mesh = Mesh(crew, config=config)
    bury = release_on_death(config, crew.queues.broker_names())
    env = {"ONCE_LEDGER": str(book)}

    def worker() -> WorkerProcess:
        return WorkerProcess(CREW, config, env=env).start()

    runs: list[Run[list[str]]] = []
    at_work = worker()
    try:
        for i in range(KILLS):
            run = mesh.start(crew.lead, i, run_id=f"r{i}")
            runs.append(run)
            moment = "began" if i % 2 else "paid"
            wanted = {f"{moment} {run.run_id}/{n}" for n in (1, 2, 3)}
            eventually(lambda wanted=wanted: wanted <= set(book.read_text().splitlines()))
            at_work.kill()
            at_work.join()
            bury(at_work.name, -9)
            at_work = worker()
        for run in runs:  # the blind and the vague one are held; the known one has ended
            eventually(
                lambda run=run: [(a.name, a.why) for a in held(run)] == [("blind", "in_doubt"), ("vague", "in_doubt")]
            )
            assert [e.n for e in run.events() if isinstance(e, StepInDoubt)].count(1) == 1
        paid = Counter(line for line in book.read_text().splitlines() if line.startswith("paid"))
        assert set(paid.values()) == {1}
        show_run("r0", broker=valkey.broker_url, as_json=False, file=None)
        shown = capsys.readouterr().out
        assert (
            "waiting: a decision, because it was interrupted and may have happened: agentmesh runs resolve r0 1 done"
            in shown
        )
        assert "(run r0, step 1, blind" in shown
        for run in runs:  # a person looks into the book
            for item in held(run):
                known = f"paid {run.run_id}/{item.n}" in paid
                run.resolve(item, "done" if known else "retry", value="paid, said a person", by="ana")
        ends = Counter(word for run in runs for word in run.result(timeout_s=20))
        lines = Counter(line for line in book.read_text().splitlines() if line.startswith("paid"))
        assert len(lines) == 3 * KILLS
        assert set(lines.values()) == {1}
        assert sum(ends.values()) == 3 * KILLS
        assert min(ends["paid"], ends["paid, said the bank"], ends["paid, said a person"]) > 0
    finally:
        at_work.kill()
        at_work.join()
        mesh.close()


def held(run: Run[Any]) -> list[Approval]:
    return sorted(run.waiting_for(), key=lambda a: a.n)
