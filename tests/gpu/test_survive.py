"""What must survive on a queue with a model: real worker processes, real servers, real kills, 64 requests in flight."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentmesh.celery.housekeeping import Housekeeper
from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.engine.run import Run
from agentmesh.inference import batching
from agentmesh.journal.events import StepDone
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing.servers import RabbitServer, ValkeyServer, running_server
from agentmesh.testing.tiny_models import save_model
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.gpu_worker import CANCEL_WITHIN_S
from agentmesh.worker.supervisor import Supervisor

pytestmark = pytest.mark.usefixtures("device")
Eventually = Callable[..., None]
MakeScene = Callable[..., AbstractContextManager["Scene"]]
CREW = str(Path(__file__).parent / "surviving.py")
WAIT_S = 60
MANY = 64
AGAIN_S = 15.0  # from the moment the worker is ready again until all has ended


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    with running_server(ValkeyServer) as server:
        yield server


@pytest.fixture
def valkey(store: Any) -> Any:
    store.flush()
    return store


@pytest.fixture
def rabbitmq() -> Iterator[Any]:
    if missing := RabbitServer.missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with running_server(RabbitServer) as server:
        yield server


class Scene:
    """The crew as a client sees it, its supervised workers, and the file that holds its engine still."""

    def __init__(
        self, store: Any, broker: Any, folder: Path, eventually: Eventually, engine: str, processes: int
    ) -> None:
        self._eventually = eventually
        self.config = Config(broker=broker.broker_url, journal=store.url, lease_s=20.0, sweep_s=0.2, drain_s=3)
        self.crew = load_crew(CREW)
        self.mesh = Mesh(self.crew, config=self.config)
        self.held, self.fault, self.asked = (folder / f"it.{what}" for what in ("held", "fault", "asked"))
        self.asked.touch()
        self.log = folder / "worker.log"
        self.out = self.log.open("wb")
        commands = worker_commands(self.config, {CREW: self.crew}, suspects="exclude", log="json")
        commands += commands[-1:] * (1 + processes - len(commands))  # on one device, where there are no more
        self.supervisor = Supervisor(
            commands, drain_s=4, output=self.out,
            on_death=release_on_death(self.config, self.crew.queues.broker_names()),
            env={"AGENTMESH_CACHE": str(save_model(folder / "cache")), "SURVIVING": str(folder / "it"),
                 "SURVIVING_ENGINE": engine, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    @property
    def device_pid(self) -> int:
        """Of the process with the model; 0 while there is none."""
        seats = self.supervisor._permanent
        return seats[1].process.pid if seats[1].process is not None else 0

    def in_flight(self, steps: int = MANY) -> Run[list[str]]:
        """A run with so many steps in the engine, which is held."""
        assert self.run(steps) == ["said"] * steps  # from here on the engine knows how little they need
        self.held.touch()
        before = self.asked.stat().st_size
        run: Run[list[str]] = self.mesh.start(self.crew.lead, steps)
        self._eventually(lambda: self.asked.stat().st_size == before + steps)
        return run

    def run(self, steps: int) -> list[str]:
        said: list[str] = self.mesh.run(self.crew.lead, steps, timeout_s=WAIT_S)
        return said

    def ready_again(self, before: int) -> float:
        """When another process than `before` serves the device."""
        self._eventually(lambda: self.device_pid not in (0, before) and self.supervisor.health == (2, 2))
        return time.monotonic()

    def check(self, run: Run[list[str]], steps: int = MANY) -> None:
        """All ended well, and each once."""
        assert run.result(timeout_s=WAIT_S) == ["said"] * steps
        ends = Counter(e.n for e in run.events() if isinstance(e, StepDone))
        assert ends == Counter(range(1, steps + 1))


@pytest.fixture
def scene(tmp_path: Path, eventually: Eventually) -> Callable[..., AbstractContextManager[Scene]]:
    """`with scene(store, broker) as it:` the crew at work on these servers."""

    @contextmanager
    def made(store: Any, broker: Any, engine: str = "real", processes: int = 1) -> Iterator[Scene]:
        it = Scene(store, broker, tmp_path, eventually, engine, processes)
        it.supervisor.start()
        try:
            assert it.supervisor.wait_ready(WAIT_S)
            yield it
        except BaseException:
            print(it.log.read_text())
            raise
        finally:
            it.held.unlink(missing_ok=True)
            it.supervisor.stop(now=True)
            it.supervisor.join(10)
            it.out.close()
            it.mesh.close()

    return made


@pytest.mark.parametrize("engine", ["real", "fake"])
def test_a_loop_and_then_its_worker_die_with_sixty_four_in_flight(scene: MakeScene, valkey: Any, engine: str) -> None:
    with scene(valkey, valkey, engine) as it:
        before = it.device_pid
        if engine == "real":
            run = it.in_flight()
            it.fault.touch()
            it.held.unlink()
            it.check(run)
            assert f"ended with {MANY} requests in it: RuntimeError: a passing fault" in it.log.read_text()
            assert it.device_pid == before
        run = it.in_flight()
        os.kill(before, signal.SIGKILL)
        it.held.unlink()
        ready = it.ready_again(before)
        it.check(run)
        assert time.monotonic() - ready < AGAIN_S


@pytest.mark.parametrize("broker", ["valkey", "rabbitmq"])
def test_the_broker_killed_with_sixty_four_in_flight(
    scene: MakeScene, valkey: Any, broker: str, request: pytest.FixtureRequest, eventually: Eventually
) -> None:
    """Valkey is the journal too. What is answered while the server is down is written when it is back."""
    server = request.getfixturevalue(broker)
    with scene(valkey, server) as it:
        run, before = it.in_flight(), it.device_pid
        if broker == "rabbitmq":
            server.sync_queues()
        server.kill()
        it.held.unlink()
        eventually(lambda: it.log.read_text().count("lost the connection to the broker") >= 2)
        server.restart()
        back = time.monotonic()
        it.check(run)
        assert time.monotonic() - back < AGAIN_S
        assert it.device_pid == before  # nothing that was computed is computed again
        assert it.run(3) == ["said"] * 3


@pytest.mark.usefixtures("gpus")
def test_two_processes_share_a_queue(scene: MakeScene, valkey: Any, eventually: Eventually) -> None:
    """On two GPUs one each, else both on one device."""
    with scene(valkey, valkey, processes=2) as it:

        def done() -> Counter[str]:
            lines = [
                line for line in it.log.read_text().splitlines() if "Ask Batch done" in line and line.endswith("}")
            ]
            return Counter(json.loads(line)["worker"] for line in lines)

        assert len(it.supervisor.pids) == 3
        assert it.run(200) == ["said"] * 200
        eventually(lambda: sum(done().values()) == 200)
        assert len(done()) == 2


def test_a_thousand_runs_cancelled_in_flight_leave_the_engine_free(
    valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setenv("AGENTMESH_CACHE", str(save_model(tmp_path)))
    monkeypatch.setattr(batching, "CPU_CONTEXTS", 100)  # prompts: the cache holds a thousand
    monkeypatch.setattr(Housekeeper, "renew_most_s", CANCEL_WITHIN_S)  # as in a worker process of the device
    many = 1000
    crew = load_crew(CREW)
    models = ModelRegistry()
    local: Any = models("local:tiny")[0]
    engine = local.prepare(requests=many + 50, batch_tokens=2048)
    engine._demand.tokens, engine._demand._answer_tokens = 64.0, 16.0  # they are cancelled long before they need more
    forward = engine._model.forward
    engine._model.forward = lambda *args, **kwargs: time.sleep(0.05) or forward(*args, **kwargs)
    mesh = Mesh(crew, config=Config(broker=valkey.broker_url, journal=valkey.url), models=models)
    with mesh.worker(concurrency=2 * many, admits=engine.admits):
        runs = [mesh.start(crew.agents["Long"], i) for i in range(many)]
        eventually(lambda: len(engine._flights) == many)
        others = [mesh.start(crew.lead, 4) for _ in range(8)]
        for run in runs:
            run.cancel()
        cancelled, steps = time.monotonic(), engine.gauge.steps
        eventually(lambda: engine.gauge.idle)
        took_s, more = time.monotonic() - cancelled, engine.gauge.steps - steps
        assert all(other.result(timeout_s=WAIT_S) == ["said"] * 4 for other in others)
        eventually(lambda: engine.gauge.free_pages == engine.gauge.pages)
        assert engine._sampler._rows == {}
        assert engine.admits(0) == many + 50
    mesh.close()
    assert more < 5.0 / 0.05  # each step takes so long at least
    assert took_s < 15  # a second or two on a machine with time; uncancelled it would be forty
