"""Two real worker processes seen by an operator: one tree of spans for each run, metrics and health over HTTP, JSON logs."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from agentmesh.config import Config
from agentmesh.errors import ConfigError
from agentmesh.mesh import Mesh
from agentmesh.observability.tracing import span_id, trace_id
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeOpenAI, says, uses
from agentmesh.worker.health_server import parse_address

CREW = str(Path(__file__).parent / "watched.py")
CALLER = SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def answer(body: dict[str, Any]) -> Any:
    last = body["messages"][-1]
    return says(last["content"]) if last["role"] == "tool" else uses("look_up", word=last["content"])


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


@pytest.fixture(scope="module")
def seen(_valkey_server: Any, tmp_path_factory: pytest.TempPathFactory, eventually: Any) -> Any:
    """Everything that one worker command shows while two runs go by."""
    _valkey_server.flush()
    folder = tmp_path_factory.mktemp("watched")
    argv = [sys.executable, "-m", "agentmesh.cli.main", "worker", CREW, "--processes", "2", "--metrics", "0"]
    argv += ["--log", "json", "--broker", _valkey_server.broker_url]
    it = SimpleNamespace(folder=folder)
    with FakeOpenAI(answer) as server, (folder / "log").open("w") as log:
        env = {**os.environ, "WATCHED": str(folder), "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k"}
        env["AGENTMESH_JOURNAL"] = _valkey_server.url
        worker = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert worker.stdout is not None
            url = re.search(r"http://\S+(?=/metrics)", worker.stdout.readline())[0]  # type: ignore[index]
            it.early = get(f"{url}/health/live"), get(f"{url}/health/ready")
            eventually(lambda: get(f"{url}/health/ready")[0] == 200)
            it.ready = get(f"{url}/health/ready")
            config = Config(broker=_valkey_server.broker_url, journal=_valkey_server.url)
            mesh = Mesh(load_crew(CREW), config=config)
            with use_span(NonRecordingSpan(CALLER)):
                called = mesh.start(mesh.crew.lead, "tea", run_id="called")
            alone = mesh.start(mesh.crew.lead, "mint", run_id="alone")
            eventually(lambda: 'agentmesh_entries{state="leased"} 8.0' in get(f"{url}/metrics")[1])
            it.during = get(f"{url}/metrics")[1]
            (folder / "go").touch()
            it.values = called.result(timeout_s=20), alone.result(timeout_s=20)
            it.after = get(f"{url}/metrics")[1]
            it.lost = get(f"{url}/nowhere")
            mesh.close()
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(20)
            worker.stdout.close()  # type: ignore[union-attr]
    it.code = worker.returncode
    it.spans = [json.loads(x) for f in folder.glob("spans-*") for x in f.read_text().splitlines()]
    it.log = (folder / "log").read_text().splitlines()
    return it


def of(seen: Any, run_id: str) -> list[dict[str, Any]]:
    return [s for s in seen.spans if s["attributes"].get("agentmesh.run", "").partition("/")[0] == run_id]


@pytest.mark.parametrize("run_id", ["called", "alone"])
def test_a_run_is_one_tree_across_processes(seen: Any, run_id: str) -> None:
    spans = of(seen, run_id)
    assert sorted(s["name"] for s in spans) == sorted(
        ["invoke_agent Lead", *["invoke_agent Worker"] * 4, *["chat fake"] * 8, *["execute_tool look_up"] * 4,
         *["execute_tool flaky"] * 2, "execute_tool broken"]
    )  # fmt: skip
    trace = 0xABC if run_id == "called" else trace_id("alone")
    assert {s["context"]["trace_id"] for s in spans} == {f"0x{trace:032x}"}
    by_id = {s["context"]["span_id"]: s for s in spans}
    assert len(by_id) == len(spans)
    (top,) = [s for s in spans if s["parent_id"] not in by_id]
    assert top["context"]["span_id"] == f"0x{span_id(run_id):016x}"
    assert top["parent_id"] == ("0x0000000000000def" if run_id == "called" else None)
    inside = [s for s in seen.spans if s["name"] == "own" and s["parent_id"] in by_id]
    assert len(inside) == 4  # what a tool traces of its own stands below the tool
    assert {by_id[s["parent_id"]]["name"] for s in inside} == {"execute_tool look_up"}


def test_the_spans_of_the_runs_come_from_both_processes(seen: Any) -> None:
    assert len({s["pid"] for s in seen.spans}) == 2


def test_spans_speak_the_conventions(seen: Any) -> None:
    spans = of(seen, "alone")
    chat = next(s for s in spans if s["name"] == "chat fake")
    assert chat["kind"] == "SpanKind.CLIENT"
    wanted = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "fake",
              "gen_ai.agent.name": "Worker", "gen_ai.conversation.id": "alone"}  # fmt: skip
    assert wanted.items() <= chat["attributes"].items()
    assert chat["attributes"]["gen_ai.usage.input_tokens"] > 0
    assert chat["attributes"]["gen_ai.usage.output_tokens"] > 0
    tries = {s["attributes"]["agentmesh.attempt"]: s for s in spans if s["name"] == "execute_tool flaky"}
    assert tries[1]["status"]["status_code"] == "ERROR"
    assert tries[1]["attributes"]["error.type"] == "ToolError"
    assert tries[2]["status"]["status_code"] == "UNSET"
    (broken,) = [s for s in spans if s["name"] == "execute_tool broken"]
    assert broken["attributes"]["error.type"] == "ToolError"
    assert "mint" not in json.dumps(spans)  # no prompt, answer or argument leaves by this door


def test_metrics_over_http(seen: Any) -> None:
    for line in ('agentmesh_workers{state="ready"} 2.0', "agentmesh_journal_up 1.0", "agentmesh_open_runs 10.0"):
        assert line in seen.during
    for line in (
        'agentmesh_steps_total{kind="Ask",name="Worker",outcome="done"} 16.0',
        'agentmesh_steps_total{kind="Call",name="flaky",outcome="retried"} 2.0',
        'agentmesh_steps_total{kind="Call",name="broken",outcome="failed"} 2.0',
        'agentmesh_repeats_total{kind="Call",name="flaky"} 2.0',
        'agentmesh_step_seconds_count{kind="Call",name="look_up"} 8.0',
        'agentmesh_queue_depth{queue="agentmesh.watched.main"} 0.0',
    ):
        assert line in seen.after, line
    tokens = re.search(r'agentmesh_tokens_total\{agent="Worker",model="openai:fake",type="input"\} (\S+)', seen.after)
    assert tokens is not None
    assert float(tokens[1]) > 0


def test_health_for_probes(seen: Any) -> None:
    (alive, _), (early, _) = seen.early
    assert (alive, early) == (200, 503)  # the supervisor lives before its workers consume
    assert seen.ready == (200, '{"ready": true, "workers": {"expected": 2, "ready": 2}, "journal": true}')
    assert seen.lost[0] == 404
    assert seen.code == 0


def test_every_log_line_of_a_step_says_where_it_was(seen: Any) -> None:
    lines = [json.loads(line) for line in seen.log]
    own = [x for x in lines if x["logger"] == "users.own" and x["run"] == "alone"]
    assert [(x["message"], x["attempt"], x["agent"]) for x in own] == [
        ("attempt 1", 1, "Lead"),
        ("attempt 2", 2, "Lead"),
    ]
    assert len({x["step"] for x in own}) == 1
    ends = [x for x in lines if x["logger"] == "agentmesh.step" and x.get("run", "").startswith("alone")]
    assert len(ends) == 15  # 8 asks, 4 look-ups, 2 tries of flaky, 1 of broken
    assert not [x for x in lines if x["logger"].startswith(("celery", "kombu"))]


def test_an_address_is_a_port_or_host_and_port() -> None:
    assert parse_address("9464") == ("127.0.0.1", 9464)
    assert parse_address("0.0.0.0:9464") == ("0.0.0.0", 9464)
    assert parse_address("[::]:9464") == ("::", 9464)
    with pytest.raises(ConfigError, match="not an address"):
        parse_address("here")
