"""A device's worker seen from outside: health and metrics over HTTP, while it works, hangs and recovers."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentmesh.cli.worker import serve_metrics
from agentmesh.config import Config
from agentmesh.inference.engine import InferenceEngine
from agentmesh.observability.engine_status import STATUS_FOLDER_ENV, EngineStatus, read_statuses, write_status
from agentmesh.runtime.optional import METRICS_FOLDER_ENV
from agentmesh.testing.tiny_models import save_model
from agentmesh.worker.gpu_worker import StatusReporter

pytestmark = pytest.mark.usefixtures("device")
CREW = str(Path(__file__).parent / "asking.py")
Seen = Callable[..., AbstractContextManager[tuple[Any, str]]]
WAIT_S = 60


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read().decode()


@pytest.fixture
def seen(working: Callable[..., AbstractContextManager[Any]], valkey: Any, tmp_path: Path) -> Seen:
    """A device worker and the URL of its supervisor's endpoint."""
    told = {METRICS_FOLDER_ENV: str(tmp_path), STATUS_FOLDER_ENV: str(tmp_path)}
    config = Config(broker=valkey.broker_url, journal=valkey.url)

    @contextmanager
    def it(fault: str) -> Iterator[tuple[Any, str]]:
        with working(valkey, tmp_path, fault, ASKING_HUNG_S="3.2", **told) as work, ExitStack() as stack:
            at = serve_metrics(stack, "0", config, work.supervisor, str(tmp_path))
            yield work, at.removeprefix(" · metrics ").removesuffix("/metrics")

    return it


def number(page: str, name: str, *labels: str) -> float:
    (row,) = [x for x in page.splitlines() if x.startswith(name) and all(label in x for label in labels)]
    assert 'model="tiny"' in row
    return float(row.rpartition(" ")[2])


def test_how_a_device_worker_does_is_told_over_http(seen: Seen, device: str, eventually: Any) -> None:
    with seen("slow") as (work, url):
        (engine,) = json.loads(get(f"{url}/health")[1])["engines"]
        assert (engine["model"], engine["device"].partition(":")[0], engine["pid"]) == ("tiny", device, work.device_pid)
        assert (engine["in_flight"], engine["places"], engine["steps"], engine["unhealthy_reason"]) == (0, 256, 1, "")
        alike = "what all of them begin with, longer than a page of the cache"
        work.start("Sixty", alike).result(timeout_s=WAIT_S)
        runs = [work.start("Sixty", f"{alike} {i}") for i in range(6)]
        eventually(lambda: number(get(f"{url}/metrics")[1], "agentmesh_engine_requests", "running") == 6)
        page = get(f"{url}/metrics")[1]
        assert number(page, "agentmesh_engine_places", "taken") == 6
        assert number(page, "agentmesh_engine_batch_tokens") == {"cpu": 256, "cuda": 2048}[device]
        assert number(page, "agentmesh_engine_memory_bytes", "used") > 2**20
        assert ("gpu_free" in page) == (device == "cuda")
        for run in runs:
            run.result(timeout_s=WAIT_S)
        eventually(lambda: number(get(f"{url}/metrics")[1], "agentmesh_engine_places", "taken") == 0)
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
    seen: Seen, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setattr(
        "agentmesh.observability.engine_status.UNHEALTHY_AFTER_S", 1.5
    )  # in our process, where health is judged
    with seen("hang") as (work, url):
        eventually(lambda: get(f"{url}/health")[0] == 200)
        before = work.device_pid
        work.fault.touch()
        run = work.start("Many", "a b c d e")
        eventually(lambda: "has 5 steps in flight and its engine has made no progress for" in get(f"{url}/health")[1])
        assert get(f"{url}/health/ready")[0] == 503
        eventually(
            lambda: '"problems": ["1 of 2 workers consume"]' in get(f"{url}/health")[1]
        )  # the dead worker's row is gone
        assert 'model="tiny"' not in get(f"{url}/metrics")[1]
        eventually(lambda: get(f"{url}/health")[0] == 200)
        (engine,) = json.loads(get(f"{url}/health")[1])["engines"]
        assert engine["pid"] == work.device_pid != before
        assert len(run.result(timeout_s=WAIT_S)) == 5
        os.kill(work.device_pid, signal.SIGSTOP)  # it neither dies nor says anything
        eventually(lambda: "has not reported for" in get(f"{url}/health")[1])


def test_a_served_crew_tells_of_its_engines_in_numbers(valkey: Any, tmp_path: Path, eventually: Any) -> None:
    env = {"AGENTMESH_CACHE": str(save_model(tmp_path)), "OMP_NUM_THREADS": "1", "AGENTMESH_BROKER": valkey.broker_url}
    argv = [sys.executable, "-m", "agentmesh.cli.main", "serve", CREW, "--port", "0"]
    served = subprocess.Popen(argv, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)
    try:
        assert served.stderr is not None
        (url,) = re.findall(r"(http://\S+)/v1 ", served.stderr.readline())
        eventually(lambda: get(f"{url}/health")[0] == 200)
        told = json.loads(get(f"{url}/health")[1])
        assert (told["workers"], told["engines"]) == ({"expected": 2, "ready": 2}, {"all": 1, "healthy": 1})
    finally:
        served.terminate()
        served.communicate(timeout=WAIT_S)


def test_a_folder_that_cannot_be_written_is_said_once_and_tried_again(
    engine: InferenceEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    eventually: Any,
) -> None:
    monkeypatch.setenv(STATUS_FOLDER_ENV, str(tmp_path / "gone"))
    monkeypatch.setattr("agentmesh.worker.gpu_worker.STATUS_INTERVAL_S", 0.01)
    report = StatusReporter(engine, model="m", worker="w", in_flight=lambda: 3, places=8)
    report.start()
    looked = len(report._samples)
    eventually(lambda: len(report._samples) > looked + 5)
    (tmp_path / "gone").mkdir()
    eventually(lambda: read_statuses(str(tmp_path / "gone"), ["w"]))
    report.stop()
    (told,) = read_statuses(str(tmp_path / "gone"), ["w"])
    assert (told.pid, told.in_flight, told.places, told.batch_tokens) == (os.getpid(), 3, 8, 64)
    (warned,) = [r.getMessage() for r in caplog.records if "cannot write the status" in r.getMessage()]
    assert warned.startswith("cannot write the status of m for the supervisor: ")


def test_a_report_of_another_version_is_read(tmp_path: Path) -> None:
    mine, gone = EngineStatus("w1", 1, "m", "cuda:0", 5.0), EngineStatus("w2", 2, "m", "cuda:1", 5.0)
    for report in (mine, gone):
        write_status(str(tmp_path), report)
    (file,) = tmp_path.glob("engine-1.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_the_next_version": 1}))
    assert read_statuses(str(tmp_path), ["w1"]) == [mine]
    assert [f.name for f in tmp_path.iterdir()] == ["engine-1.json"]
    assert read_statuses(str(tmp_path), ["w1", "w2"]) == [mine]
