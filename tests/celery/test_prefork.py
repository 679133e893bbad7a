"""`Queue(pool="prefork")` under our supervisor: two kinds of worker, and what computes can be killed."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.journal.events import StepRetried
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.supervisor import Supervisor

CREW = str(Path(__file__).parent / "computing.py")


class Work:
    """The crew as a client sees it, its supervisor, and what the tools noted."""

    def __init__(self, mesh: Mesh, supervisor: Supervisor, log: Path) -> None:
        self.mesh, self.crew, self.supervisor, self._log = mesh, mesh.crew, supervisor, log

    @property
    def notes(self) -> list[tuple[str, int]]:
        return [(name, int(pid)) for name, pid in (line.split() for line in self._log.read_text().splitlines())]

    def pids(self, name: str) -> list[int]:
        return [pid for noted, pid in self.notes if noted == name]

    def one(self, task: str, **options: Any) -> Any:
        return self.mesh.start(self.crew.agents["One"], task, **options)

    @property
    def pooled(self) -> int:
        """The process id of the prefork worker, which is the second."""
        return list(self.supervisor.pids.values())[1]


@contextmanager
def working(valkey: Any, folder: Path, *, lease_s: float = 30.0, drain_s: float = 5.0) -> Iterator[Work]:
    log = folder / "log"
    log.touch()
    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=lease_s, sweep_s=0.2, drain_s=drain_s)
    crew = load_crew(CREW)
    mesh = Mesh(crew, config=config)
    with (folder / "worker.log").open("wb") as out:
        supervisor = Supervisor(
            worker_commands(config, {CREW: crew}, events=True), drain_s=drain_s + 1, output=out, env={"COMPUTING_LOG": str(log)},
            on_death=release_on_death(config, crew.queues.broker_names()),
        )  # fmt: skip
        supervisor.start()
        try:
            assert supervisor.wait_ready(20)
            yield Work(mesh, supervisor, log)
        except BaseException:
            print((folder / "worker.log").read_text())
            raise
        finally:
            supervisor.stop(now=True)
            supervisor.join(10)
            mesh.close()


@contextmanager
def listening(app: Any) -> Iterator[dict[str, str]]:
    """The names of tasks that workers tell of, once they have succeeded; by id."""
    names: dict[str, str] = {}
    heard: dict[str, str] = {}
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(
            connection,
            handlers={
                "task-received": lambda event: names.update({event["uuid"]: event["name"]}),
                "task-succeeded": lambda event: heard.update({event["uuid"]: names.get(event["uuid"], "")}),
            },
        )
        thread = threading.Thread(target=lambda: receiver.capture(limit=None, timeout=None, wakeup=False), daemon=True)
        thread.start()
        try:
            yield heard
        finally:
            receiver.should_stop = True
            thread.join(10)


def test_two_kinds_of_worker_and_two_kinds_of_death(valkey: Any, tmp_path: Path, eventually: Any) -> None:
    """The lease is 30 s: a step that continues sooner was released, not expired."""
    with working(valkey, tmp_path) as it:
        with listening(it.mesh.app) as heard:

            def told() -> bool:  # what was told before we listened is not heard: run again
                assert it.mesh.run(it.crew.lead, "x", timeout_s=20) == [0, 1, 2, 3]
                return set(heard.values()) >= {"here.call", "add.call"}

            eventually(told)
        assert len({pid for _, pid in it.notes}) == 4  # processes side by side
        assert it.pooled not in {pid for _, pid in it.notes}

        run = it.one("die")
        assert run.result(timeout_s=15) == "die"
        assert len(set(it.pids("die"))) == 2

        run = it.one("hang")
        eventually(lambda: it.pids("hang"))
        os.kill(it.pooled, signal.SIGKILL)
        assert run.result(timeout_s=15) == "hang"
        assert not alive(it.pids("hang")[0])  # a dead worker's processes go with it
        it.supervisor.stop()
        assert it.supervisor.join(10)
        with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
            assert client.zcard("agentmesh:leased") == 0
            assert not list(client.scan_iter("agentmesh:wl:*"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_tool_that_will_not_stop_is_killed(valkey: Any, tmp_path: Path, monkeypatch: Any, eventually: Any) -> None:
    """One that lets others be is retried as it says and ends as StepTimeout; one that seizes its process is in doubt."""
    monkeypatch.setattr("agentmesh.celery.dispatch.KILL_GRACE_S", 1.0)
    with working(valkey, tmp_path, lease_s=1.0) as it:
        both = [it.one("spin"), it.one("seize")]
        assert both[0].result(timeout_s=15) == "StepTimeout"
        assert [type(e) for e in both[0].events()].count(StepRetried) == 1
        spun = it.pids("spin")
        assert len(set(spun)) == 2
        eventually(lambda: both[1].waiting_for())
        assert both[1].waiting_for()[0].why == "in_doubt"
        (seized,) = it.pids("seize")
        eventually(lambda: not any(alive(pid) for pid in (*spun, seized)))
        assert it.mesh.run(it.crew.lead, "x", timeout_s=20) == [0, 1, 2, 3]
        assert len(it.pids("seize")) == 1
