"""A queue with a model: a worker process of its own, which takes what it has room for and is started again when it fails."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from agentmesh.celery.app import make_app
from agentmesh.celery.embedded import EmbeddedWorker, InProcessWorker
from agentmesh.celery.housekeeping import Housekeeper
from agentmesh.celery.registry import runtime_of
from agentmesh.config import Config
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import DeviceQueue, Queue
from agentmesh.errors import ConfigError, DefinitionError
from agentmesh.journal.events import RunDone, StepDone
from agentmesh.mesh import Mesh
from agentmesh.message import Message
from agentmesh.model import Answer, Prompt
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing.tiny_models import make_tokenizer, save_model
from agentmesh.worker import gpus
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.gpu_worker import CANCEL_WITHIN_S

pytestmark = pytest.mark.usefixtures("device")
CREW = str(Path(__file__).parent / "asking.py")
Working = Callable[..., AbstractContextManager[Any]]  # of conftest.py
OTHER = Path(__file__).parent / "asking_too.py"
WAIT_S = 60


def words(n: int) -> str:
    return " ".join(f"w{i}" for i in range(n))


def test_the_model_s_steps_go_to_its_own_process_and_share_batches(
    working: Working, valkey: Any, tmp_path: Path
) -> None:
    with working(valkey, tmp_path) as work:
        assert len(work.supervisor.pids) == 2
        said = work.start("Many", words(40)).result(timeout_s=WAIT_S)
        assert len(said) == 40
        assert not [s for s in said if s.startswith("failed")]
        assert "tiny is loaded in" in work.log


@pytest.mark.parametrize(
    ("fault", "told"), [("hang", "has made no progress for"), ("cuda", "CUDA error: an illegal memory")]
)
def test_an_engine_that_hangs_or_breaks_its_device_takes_its_process_along(
    working: Working, valkey: Any, tmp_path: Path, fault: str, told: str
) -> None:
    with working(valkey, tmp_path, fault) as work:
        before = work.device_pid
        work.fault.touch()
        said = work.start("Many", words(12)).result(timeout_s=WAIT_S)
        assert not [s for s in said if s.startswith("failed")]
        assert work.device_pid != before
        assert "this worker restarts" in work.log
        assert told in work.log


def test_a_poisonous_prompt_fails_alone_and_kills_no_process(working: Working, valkey: Any, tmp_path: Path) -> None:
    assert make_tokenizer()("@")["input_ids"] == [3 + 31]
    with working(valkey, tmp_path, "poison") as work:
        before = work.device_pid
        said = work.start("Many", f"{words(30)} a@@@b {words(33)}").result(timeout_s=WAIT_S)
        assert [i for i, s in enumerate(said) if s.startswith("failed")] == [30]
        assert said[30] == "failed: DelegateFailed"
        assert work.device_pid == before


@pytest.mark.timeout(5 * WAIT_S)
def test_a_deadly_prompt_among_sixty_three_others_is_held_alone(
    working: Working, valkey: Any, tmp_path: Path, eventually: Any
) -> None:
    with working(valkey, tmp_path, "death") as work:
        run = work.start("Many", f"{words(30)} a@@@b {words(33)}")
        eventually(
            lambda: run.waiting_for(), timeout_s=3 * WAIT_S
        )  # several processes, each with torch and a model to load
        (item,) = run.waiting_for()
        assert (item.run_id, item.why) == (f"{run.run_id}/31", "quarantined")
        run.resolve(item, "failed")
        said = run.result(timeout_s=WAIT_S)
        assert [i for i, s in enumerate(said) if s.startswith("failed")] == [30]
        for n in {*range(1, 65)} - {31}:
            events = work.mesh.get(f"{run.run_id}/{n}").events()
            assert [type(e) for e in events if isinstance(e, StepDone | RunDone)] == [StepDone, RunDone]


def test_a_cancelled_run_is_no_longer_computed(
    valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setenv("AGENTMESH_CACHE", str(save_model(tmp_path)))
    models = ModelRegistry()
    local: Any = models("local:tiny")[0]
    engine = local.prepare()
    forward = engine._model.forward
    engine._model.forward = lambda *args, **kwargs: time.sleep(0.02) or forward(*args, **kwargs)
    mesh = Mesh(load_crew(CREW), config=Config(broker=valkey.broker_url, journal=valkey.url), models=models)
    monkeypatch.setattr(Housekeeper, "renew_most_s", CANCEL_WITHIN_S)  # as in a worker process of the device
    with mesh.worker(admits=engine.admits):
        run = mesh.start(mesh.crew.agents["Long"], "go on")
        eventually(lambda: engine.gauge.new_tokens > 20)
        run.cancel()
        cancelled, steps = time.monotonic(), engine.gauge.steps
        eventually(lambda: engine.gauge.idle)
        took_s, more = time.monotonic() - cancelled, engine.gauge.steps - steps
    new_tokens = engine.gauge.new_tokens
    mesh.close()
    assert new_tokens < 800
    assert more < 2 * CANCEL_WITHIN_S / 0.02  # each step takes so long at least
    assert took_s < 8  # a second on a machine with time; uncancelled it would be sixteen


def test_a_missing_model_is_said_before_a_process_is_started(shell: Any) -> None:
    shell.env["AGENTMESH_CACHE"] = str(shell.folder)
    shell("worker", CREW, "--queue", "gpu", code=4)
    assert shell.err.startswith("error: local model 'tiny' is not here")
    assert shell.err.endswith("help: agentmesh models pull tiny\n")


def test_one_process_a_device_and_each_sees_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(broker="redis://localhost:1", journal="redis://localhost:1")
    crew = load_crew(CREW)

    def seen(*wanted: int, **all_of: Any) -> list[str | None]:
        crew.queues["gpu"] = DeviceQueue("gpu", model="tiny", **({"devices": wanted} if wanted else all_of))
        return [c.env.get("CUDA_VISIBLE_DEVICES") for c in worker_commands(config, {CREW: crew}, queues=["gpu"])]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert seen() == ["4", "5", "7"]
    assert seen(2, 0) == ["7", "4"]
    with pytest.raises(ConfigError, match="wants GPU 3 and this machine has 3"):
        seen(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert seen() == [None]
    with pytest.raises(ConfigError, match="wants GPU 0 and this machine has none"):
        seen(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    assert gpus.visible_gpus() == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pool": "prefork"}, "leave out `pool`, which only Queue has: DeviceQueue"),
        ({"devices": []}, r"devices=\(\) is not a list of different GPU numbers; write them like"),
        ({"devices": [1, 1]}, r"devices=\(1, 1\) is not a list of different"),
        ({"gpu_memory_fraction": 85}, r"gpu_memory_fraction=85 is not in \(0, 1\]; write a part of the whole"),
        ({"lane": "fast"}, "unknown lane 'fast'; use one of: realtime, high, low"),
        ({"max_batch_tokens": -1}, "max_batch_tokens=-1 is negative"),
    ],
)
def test_a_queue_with_a_model_is_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(DefinitionError, match=told):
        DeviceQueue("gpu", model="m", **options)


def test_queues_of_one_model_name_the_same_devices() -> None:
    agent, first = load_crew(CREW).lead, DeviceQueue("a", model="m", devices=[0])
    with pytest.raises(DefinitionError, match=r"queues 'a' and 'b' of model 'm' have devices=\(0,\) and 'all'"):
        Crew(agent, queues=[Queue("main"), DeviceQueue("gpu", model="tiny"), first, DeviceQueue("b", model="m")])
    same = DeviceQueue("b", model="m", devices=[0])
    assert Crew(agent, queues=[DeviceQueue("gpu", model="tiny"), first, same]).queues.on_devices()


def test_a_worker_takes_no_more_than_is_admitted(valkey: Any, tmp_path: Path) -> None:
    crew: Crew = load_crew(CREW)
    config = Config(broker=valkey.broker_url, journal=valkey.url)
    most: list[int] = []
    model = _Counting(most)
    mesh = Mesh(crew, config=config, models=lambda wanted: (model, "tiny"))
    with mesh.worker(queues=["main"]), mesh.worker(queues=["gpu"], admits=lambda in_flight: 3 - in_flight):
        said = mesh.start(crew.agents["Many"], words(20)).result(timeout_s=WAIT_S)
    mesh.close()
    assert len(said) == 20
    assert max(most) == 3


def test_crews_of_one_device_worker_count_together(valkey: Any) -> None:
    config = Config(broker=valkey.broker_url, journal=valkey.url)
    app, most = make_app(config.broker), list[int]()
    model = _Counting(most)
    loaded = [load_crew(CREW), load_crew(str(OTHER))]
    meshes = [Mesh(crew, app=app, config=config, models=lambda wanted: (model, "tiny")) for crew in loaded]
    gpu = [name for crew in loaded for name in crew.queues.broker_names(["gpu"])]
    shared = EmbeddedWorker(app, queues=gpu, admits=lambda in_flight: 3 - in_flight)
    runtimes = [runtime_of(app, crew.name) for crew in loaded]
    with meshes[0].worker(queues=["main"]), meshes[1].worker(queues=["main"]), InProcessWorker(runtimes, [shared]):
        runs = [mesh.start(mesh.crew.lead, words(20)) for mesh in meshes]
        assert [len(run.result(timeout_s=WAIT_S)) for run in runs] == [20, 20]
    for mesh in meshes:
        mesh.close()
    assert max(most) == 3
    assert len(most) == 40


def test_one_process_a_device_serves_two_crews(working: Working, valkey: Any, tmp_path: Path) -> None:
    with working(valkey, tmp_path, crews=[CREW, str(OTHER)]) as work:
        assert len(work.supervisor.pids) == 2
        other = Mesh(load_crew(str(OTHER)), config=work.mesh.config)
        runs = [work.start("Many", words(12)), other.start(other.crew.lead, words(12))]
        for run in runs:
            said = run.result(timeout_s=WAIT_S)
            assert [len(said), sum(s.startswith("failed") for s in said)] == [12, 0]
        other.close()
        assert work.log.count("tiny is loaded in") == 1


class _Counting:
    """A model that notes how many ask it at once."""

    def __init__(self, most: list[int]) -> None:
        self._now, self._most = 0, most

    async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
        self._now += 1
        self._most.append(self._now)
        await asyncio.sleep(0.01)
        self._now -= 1
        return Answer(Message("assistant", "yes"))
