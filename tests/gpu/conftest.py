"""A tiny made model in an engine, on the CPU and on a GPU; each test has its own. `pytest -m gpu` runs those on a GPU."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.inference.batching import Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import Done, InferenceRequest
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing.servers import ValkeyServer, running_server
from agentmesh.testing.tiny_models import VOCABULARY, make_model, save_model
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.supervisor import Supervisor

torch.set_num_threads(1)  # two threads for so small a model wait for each other more than they compute
WHERE, GPUS = ["cpu"], list[str]()
if torch.cuda.is_available():
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    GPUS = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    torch.cuda.init()  # before a test hides the GPU from the processes it starts
    WHERE.append(pytest.param("cuda", marks=pytest.mark.gpu))  # type: ignore[arg-type]
CREW = str(Path(__file__).parent / "asking.py")
WAIT_S = 60
SMALL = Shape(pages=80, page_tokens=16, batch_tokens=64, batch_requests=32)


@pytest.fixture(scope="session")
def eventually(eventually: Callable[..., None]) -> Callable[..., None]:
    """That of all tests, with as long as models take to load."""
    return partial(eventually, timeout_s=WAIT_S)


@pytest.fixture(params=WHERE)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the test's models are, those of its worker processes too; of several GPUs it is the first."""
    if request.param == "cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPUS[0])
    elif GPUS:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return str(request.param)


@pytest.fixture
def gpus(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that takes two GPUs where there are two."""
    if device == "cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS[:2]))


@pytest.fixture
def make_engine(device: str) -> Iterator[Callable[..., InferenceEngine]]:
    """Makes engines around fresh models, and closes them."""
    made: list[InferenceEngine] = []

    def make(shape: Shape = SMALL, *, model: Any = None, **more: Any) -> InferenceEngine:
        made.append(InferenceEngine((make_model() if model is None else model).to(device), shape, **more))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., InferenceEngine]) -> InferenceEngine:
    return make_engine()


@pytest.fixture
def prompts() -> Callable[..., list[list[int]]]:
    """`prompts(12, shortest=3)`: of many lengths, none the beginning of another."""

    def made(n: int, *, shortest: int = 3) -> list[list[int]]:
        return [[3 + (7 * i + j * (i + 3)) % (VOCABULARY - 3) for j in range(shortest + 5 * i % 40)] for i in range(n)]

    return made


@pytest.fixture
def answers() -> Callable[[InferenceEngine, Sequence[InferenceRequest]], list[Done]]:
    """`answers(engine, requests)`: those of an engine to requests that come at once."""
    return lambda engine, requests: [f.result(WAIT_S) for f in [engine.submit(r) for r in requests]]


@pytest.fixture(scope="module")
def valkey() -> Iterator[Any]:
    with running_server(ValkeyServer) as server:
        yield server


class Work:
    """The crew as a client sees it, its supervisor and the worker's log."""

    def __init__(self, mesh: Mesh, supervisor: Supervisor, folder: Path) -> None:
        self.mesh, self.supervisor, self._folder = mesh, supervisor, folder
        self.fault = folder / "asking.fault"

    @property
    def log(self) -> str:
        return (self._folder / "worker.log").read_text()

    @property
    def device_pid(self) -> int:
        return list(self.supervisor.pids.values())[1]

    def start(self, agent: str, task: str) -> Any:
        return self.mesh.start(self.mesh.crew.agents[agent], task)


@contextmanager
def _working(valkey: Any, folder: Path, fault: str = "", crews: Sequence[str] = (CREW,), **more: str) -> Iterator[Work]:
    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=20.0, sweep_s=0.2, drain_s=3)
    crew = load_crew(CREW)
    mesh = Mesh(crew, config=config)
    cache = save_model(folder / "cache")
    env = {
        "AGENTMESH_CACHE": str(cache),
        "ASKING_FAULT": fault,
        "ASKING_LOG": str(folder / "asking"),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    with (folder / "worker.log").open("wb") as out:
        supervisor = Supervisor(
            worker_commands(config, {c: load_crew(c) for c in crews}, suspects="exclude", log="text"), drain_s=4, output=out, env=env,
            on_death=release_on_death(config, crew.queues.broker_names()),
        )  # fmt: skip
        supervisor.start()
        try:
            assert supervisor.wait_ready(WAIT_S)
            yield Work(mesh, supervisor, folder)
        except BaseException:
            print((folder / "worker.log").read_text())
            raise
        finally:
            supervisor.stop(now=True)
            supervisor.join(10)
            mesh.close()


@pytest.fixture
def working() -> Callable[..., AbstractContextManager[Work]]:
    """`with working(valkey, folder, fault) as work:` the crew of `asking.py` at work, with a fault that its file names."""
    return _working
