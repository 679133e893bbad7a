"""A queue with a model: a worker process of its own, which takes what it has room for and is started again when it fails."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentmesh.boot import COUNTS_IN, load_crew
from agentmesh.celery.app import make_app
from agentmesh.celery.embedded import EmbeddedWorker
from agentmesh.celery.inprocess import InProcess
from agentmesh.celery.loop import drive
from agentmesh.celery.supervise import Supervisor
from agentmesh.celery.sweep import Tender
from agentmesh.cli import devices
from agentmesh.cli.child import specs_of
from agentmesh.cli.device import CANCELLED_S
from agentmesh.cli.reporting import Reporting
from agentmesh.cli.worker import giver_back, serve_metrics
from agentmesh.config import Config
from agentmesh.crew import Crew
from agentmesh.errors import ConfigError, DefinitionError
from agentmesh.event import RunDone, StepDone
from agentmesh.gpu.engine import Engine
from agentmesh.mesh import Mesh
from agentmesh.message import Message
from agentmesh.models.named import Models
from agentmesh.ports import Answer, Prompt
from agentmesh.queue import Queue
from agentmesh.report import REPORTS_IN, EngineReport, put_report, reports_in
from agentmesh.testing.servers import ValkeyServer, a_server
from agentmesh.testing.tiny import made_tokenizer, saved

pytestmark = pytest.mark.usefixtures("device")
CREW = str(Path(__file__).parent / "asking.py")
OTHER = Path(__file__).parent / "asking_too.py"
WAIT_S = 60


@pytest.fixture(scope="module")
def valkey() -> Iterator[Any]:
    with a_server(ValkeyServer) as server:
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
def working(valkey: Any, folder: Path, fault: str = "", crews: Sequence[str] = (CREW,), **more: str) -> Iterator[Work]:
    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=20.0, sweep_s=0.2, drain_s=3)
    crew = load_crew(CREW)
    mesh = Mesh(crew, config=config)
    cache = saved(folder / "cache")
    env = {
        "AGENTMESH_CACHE": str(cache),
        "ASKING_FAULT": fault,
        "ASKING_LOG": str(folder / "asking"),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    with (folder / "worker.log").open("wb") as out:
        supervisor = Supervisor(
            specs_of(config, {c: load_crew(c) for c in crews}, suspects="elsewhere", log="text"), drain_s=4, output=out, env=env,
            on_death=giver_back(config, crew.broker_queues()),
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


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def words(n: int) -> str:
    return " ".join(f"w{i}" for i in range(n))


def test_the_model_s_steps_go_to_its_own_process_and_share_batches(valkey: Any, tmp_path: Path) -> None:
    with working(valkey, tmp_path) as work:
        assert len(work.supervisor.pids) == 2
        said = work.start("Many", words(40)).result(timeout_s=WAIT_S)
        assert len(said) == 40
        assert not [s for s in said if s.startswith("failed")]
        assert "tiny is loaded in" in work.log


def test_a_killed_worker_s_steps_all_end_and_none_twice(valkey: Any, tmp_path: Path) -> None:
    with working(valkey, tmp_path) as work:
        run = work.start("Many", words(64))
        until(lambda: "Ask Asker done" in work.log)
        os.kill(work.device_pid, signal.SIGKILL)
        said = run.result(timeout_s=WAIT_S)
        assert len(said) == 64
        assert not [s for s in said if s.startswith("failed")]
        for n in range(1, 65):
            events = drive(work.mesh.journal.events(f"{run.id}/{n}"))
            assert [type(e) for e in events if isinstance(e, StepDone | RunDone)] == [StepDone, RunDone]


@pytest.mark.parametrize(
    ("fault", "told"), [("hang", "has made no step for"), ("cuda", "CUDA error: an illegal memory")]
)
def test_an_engine_that_hangs_or_breaks_its_device_takes_its_process_along(
    valkey: Any, tmp_path: Path, fault: str, told: str
) -> None:
    with working(valkey, tmp_path, fault) as work:
        before = work.device_pid
        work.fault.touch()
        said = work.start("Many", words(12)).result(timeout_s=WAIT_S)
        assert not [s for s in said if s.startswith("failed")]
        assert work.device_pid != before
        assert "this worker leaves and is started again" in work.log
        assert told in work.log


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read().decode()


@contextmanager
def seen(valkey: Any, folder: Path, fault: str = "") -> Iterator[tuple[Work, str]]:
    """A device worker and the URL of its supervisor's endpoint."""
    told = {COUNTS_IN: str(folder), REPORTS_IN: str(folder)}
    config = Config(broker=valkey.broker_url, journal=valkey.url)
    with working(valkey, folder, fault, ASKING_HUNG_S="3.2", **told) as work, ExitStack() as stack:
        at = serve_metrics(stack, "0", config, work.supervisor, str(folder))
        yield work, at.removeprefix(" · metrics ").removesuffix("/metrics")


def number(page: str, name: str, *labels: str) -> float:
    (row,) = [x for x in page.splitlines() if x.startswith(name) and all(label in x for label in labels)]
    assert 'device="cpu",model="tiny"' in row
    return float(row.rpartition(" ")[2])


def test_how_a_device_worker_does_is_told_over_http(valkey: Any, tmp_path: Path) -> None:
    with seen(valkey, tmp_path, "slow") as (work, url):
        (engine,) = json.loads(get(f"{url}/health")[1])["engines"]
        assert (engine["model"], engine["device"], engine["pid"]) == ("tiny", "cpu", work.device_pid)
        assert (engine["in_hand"], engine["places"], engine["steps"], engine["ails"]) == (0, 256, 1, "")
        alike = "what all of them begin with, longer than a page of the cache"
        work.start("Sixty", alike).result(timeout_s=WAIT_S)
        runs = [work.start("Sixty", f"{alike} {i}") for i in range(6)]
        until(lambda: number(get(f"{url}/metrics")[1], "agentmesh_engine_requests", "running") == 6)
        page = get(f"{url}/metrics")[1]
        assert number(page, "agentmesh_engine_places", "taken") == 6
        assert number(page, "agentmesh_engine_batch_tokens") == 256
        assert number(page, "agentmesh_engine_memory_bytes", "used") > 2**20
        assert "gpu_free" not in page
        for run in runs:
            run.result(timeout_s=WAIT_S)
        until(lambda: number(get(f"{url}/metrics")[1], "agentmesh_engine_places", "taken") == 0)
        page, after = get(f"{url}/metrics")[1], json.loads(get(f"{url}/health")[1])["engines"][0]
        assert number(page, "agentmesh_engine_tokens_total", "new") == after["new_tokens"] == 1 + 7 * 60
        assert number(page, "agentmesh_engine_steps_total") == after["steps"] >= 1 + 2 * 60
        assert number(page, "agentmesh_engine_requests", "running") == 0
        assert number(page, "agentmesh_engine_pages", "free") == number(page, "agentmesh_engine_pages", "all") > 0
        assert number(page, "agentmesh_engine_new_tokens_per_second") > 10
        assert 1 < number(page, "agentmesh_engine_batch_requests") <= 6
        assert 0 < number(page, "agentmesh_engine_cached_share") < 1
        assert number(page, "agentmesh_engine_deaths_total") == 0


def test_a_hung_engine_is_no_good_health_until_its_worker_is_there_again(
    valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmesh.report.STUCK_S", 1.5)  # in our process, where health is judged
    with seen(valkey, tmp_path, "hang") as (work, url):
        until(lambda: get(f"{url}/health")[0] == 200)
        before = work.device_pid
        work.fault.touch()
        run = work.start("Many", words(5))
        until(lambda: "has work in hand (5 steps) and its engine has made no step for" in get(f"{url}/health")[1])
        assert get(f"{url}/health/ready")[0] == 503
        until(lambda: '"why": ["1 of 2 workers consume"]' in get(f"{url}/health")[1])  # the dead worker's row is gone
        assert 'model="tiny"' not in get(f"{url}/metrics")[1]
        until(lambda: get(f"{url}/health")[0] == 200)
        (engine,) = json.loads(get(f"{url}/health")[1])["engines"]
        assert engine["pid"] == work.device_pid != before
        assert len(run.result(timeout_s=WAIT_S)) == 5
        os.kill(work.device_pid, signal.SIGSTOP)  # it neither dies nor says anything
        until(lambda: "has said nothing for" in get(f"{url}/health")[1])


def test_a_served_crew_tells_of_its_engines_in_numbers(valkey: Any, tmp_path: Path) -> None:
    env = {"AGENTMESH_CACHE": str(saved(tmp_path)), "OMP_NUM_THREADS": "1", "AGENTMESH_BROKER": valkey.broker_url}
    argv = [sys.executable, "-m", "agentmesh.cli.main", "serve", CREW, "--port", "0"]
    served = subprocess.Popen(argv, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)
    try:
        assert served.stderr is not None
        (url,) = re.findall(r"(http://\S+)/v1 ", served.stderr.readline())
        until(lambda: get(f"{url}/health")[0] == 200)
        told = json.loads(get(f"{url}/health")[1])
        assert (told["workers"], told["engines"]) == ({"wanted": 2, "ready": 2}, {"there": 1, "well": 1})
    finally:
        served.terminate()
        served.communicate(timeout=WAIT_S)


def test_a_folder_that_cannot_be_written_is_said_once_and_tried_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(REPORTS_IN, str(tmp_path / "gone"))
    monkeypatch.setattr("agentmesh.cli.reporting.TELL_S", 0.01)
    report = Reporting(engine, model="m", worker="w", in_hand=lambda: 3, places=8)
    report.start()
    looked = len(report._looks)
    until(lambda: len(report._looks) > looked + 5)
    (tmp_path / "gone").mkdir()
    until(lambda: reports_in(str(tmp_path / "gone"), ["w"]))
    report.stop()
    (told,) = reports_in(str(tmp_path / "gone"), ["w"])
    assert (told.pid, told.in_hand, told.places, told.batch_tokens) == (os.getpid(), 3, 8, 64)
    (warned,) = [r.getMessage() for r in caplog.records if "cannot be told" in r.getMessage()]
    assert warned.startswith("how m does cannot be told to its supervisor: ")


def test_a_report_of_another_version_is_read(tmp_path: Path) -> None:
    mine, gone = EngineReport("w1", 1, "m", "cuda:0", 5.0), EngineReport("w2", 2, "m", "cuda:1", 5.0)
    for report in (mine, gone):
        put_report(str(tmp_path), report)
    (file,) = tmp_path.glob("engine-1.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_the_next_version": 1}))
    assert reports_in(str(tmp_path), ["w1"]) == [mine]
    assert [f.name for f in tmp_path.iterdir()] == ["engine-1.json"]
    assert reports_in(str(tmp_path), ["w1", "w2"]) == [mine]


def test_a_poisonous_prompt_fails_alone_and_kills_no_process(valkey: Any, tmp_path: Path) -> None:
    assert made_tokenizer()("@")["input_ids"] == [3 + 31]
    with working(valkey, tmp_path, "poison") as work:
        before = work.device_pid
        said = work.start("Many", f"{words(30)} a@@@b {words(33)}").result(timeout_s=WAIT_S)
        assert [i for i, s in enumerate(said) if s.startswith("failed")] == [30]
        assert said[30] == "failed: DelegateFailed"
        assert work.device_pid == before


def test_a_deadly_prompt_among_sixty_three_others_is_held_alone(valkey: Any, tmp_path: Path) -> None:
    with working(valkey, tmp_path, "death") as work:
        run = work.start("Many", f"{words(30)} a@@@b {words(33)}")
        until(lambda: run.waiting_for)
        (item,) = run.waiting_for
        assert (item.run_id, item.why) == (f"{run.id}/31", "quarantined")
        run.resolve(item, "failed")
        said = run.result(timeout_s=WAIT_S)
        assert [i for i, s in enumerate(said) if s.startswith("failed")] == [30]
        for n in {*range(1, 65)} - {31}:
            events = drive(work.mesh.journal.events(f"{run.id}/{n}"))
            assert [type(e) for e in events if isinstance(e, StepDone | RunDone)] == [StepDone, RunDone]


def test_a_cancelled_run_is_no_longer_computed(valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMESH_CACHE", str(saved(tmp_path)))
    models = Models()
    local: Any = models("local:tiny")[0]
    engine = local.prepare()
    forward = engine._model.forward
    engine._model.forward = lambda *args, **kwargs: time.sleep(0.02) or forward(*args, **kwargs)
    mesh = Mesh(load_crew(CREW), config=Config(broker=valkey.broker_url, journal=valkey.url), models=models)
    monkeypatch.setattr(Tender, "renew_most_s", CANCELLED_S)  # as in a worker process of the device
    with mesh.worker(admits=engine.admits):
        run = mesh.start(mesh.crew.agents["Long"], "go on")
        until(lambda: engine.gauge.new_tokens > 20)
        run.cancel()
        cancelled = time.monotonic()
        until(lambda: engine.gauge.idle)
        took_s = time.monotonic() - cancelled
    new_tokens = engine.gauge.new_tokens
    mesh.close()
    assert new_tokens < 800
    assert took_s < 2 * CANCELLED_S


def test_a_missing_model_is_said_before_anything_is_consumed(valkey: Any, tmp_path: Path) -> None:
    config = Config(broker=valkey.broker_url, journal=valkey.url)
    commands = specs_of(config, {CREW: load_crew(CREW)}, queues=["gpu"])
    with (tmp_path / "log").open("wb") as out:
        supervisor = Supervisor(commands, output=out, env={"AGENTMESH_CACHE": str(tmp_path)})
        assert supervisor.run() == 4
    told = (tmp_path / "log").read_text()
    assert "local model 'tiny' is not here" in told
    assert "agentmesh models pull tiny" in told


def test_one_process_a_device_and_each_sees_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(broker="redis://localhost:1", journal="redis://localhost:1")
    crew = load_crew(CREW)

    def seen(*wanted: int, **all_of: Any) -> list[str | None]:
        crew.queues["gpu"] = Queue("gpu", model="tiny", **({"devices": wanted} if wanted else all_of))
        return [c.env.get("CUDA_VISIBLE_DEVICES") for c in specs_of(config, {CREW: crew}, queues=["gpu"])]

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
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert devices.found() == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"model": "m", "pool": "prefork"},
            "a queue with a model is never prefork: a forked process cannot use the device",
        ),
        ({"devices": [0]}, "devices, gpu_memory and max_batch_tokens are for a queue whose workers load a model"),
        ({"lane": "low"}, "lane='low' is between queues of one model; add model='NAME', or url= of its servers"),
        ({"model": "m", "devices": []}, r"devices=\(\) must be 'all' or GPU numbers"),
        ({"model": "m", "devices": [1, 1]}, r"devices=\(1, 1\) must be"),
        ({"model": "m", "gpu_memory": 85}, "gpu_memory=85 must be a part of the whole, such as 0.85"),
        ({"model": "m", "lane": "fast"}, "lane='fast' must be one of realtime, high, low"),
        ({"model": "m", "max_batch_tokens": -1}, "max_batch_tokens=-1 must not be negative"),
    ],
)
def test_a_queue_with_a_model_is_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(DefinitionError, match=told):
        Queue("gpu", **options)


def test_queues_of_one_model_name_the_same_devices() -> None:
    agent, first = load_crew(CREW).lead, Queue("a", model="m", devices=[0])
    with pytest.raises(DefinitionError, match=r"queues 'a' and 'b' of model 'm' have devices=\(0,\) and 'all'"):
        Crew(agent, queues=[Queue("main"), Queue("gpu", model="tiny"), first, Queue("b", model="m")])
    assert Crew(agent, queues=[Queue("gpu", model="tiny"), first, Queue("b", model="m", devices=[0])]).queues_in(
        "device"
    )


def test_a_worker_takes_no_more_than_is_admitted(valkey: Any, tmp_path: Path) -> None:
    crew: Crew = load_crew(CREW)
    config = Config(broker=valkey.broker_url, journal=valkey.url)
    most: list[int] = []
    model = _Counting(most)
    mesh = Mesh(crew, config=config, models=lambda wanted: (model, "tiny"))
    with mesh.worker(queues=["main"]), mesh.worker(queues=["gpu"], admits=lambda in_hand: 3 - in_hand):
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
    gpu = [name for crew in loaded for name in crew.broker_queues(["gpu"])]
    shared = EmbeddedWorker(app, queues=gpu, admits=lambda in_hand: 3 - in_hand)
    with meshes[0].worker(queues=["main"]), meshes[1].worker(queues=["main"]), InProcess(meshes, [shared]):
        runs = [mesh.start(mesh.crew.lead, words(20)) for mesh in meshes]
        assert [len(run.result(timeout_s=WAIT_S)) for run in runs] == [20, 20]
    for mesh in meshes:
        mesh.close()
    assert max(most) == 3
    assert len(most) == 40


def test_one_process_a_device_serves_two_crews(valkey: Any, tmp_path: Path) -> None:
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
