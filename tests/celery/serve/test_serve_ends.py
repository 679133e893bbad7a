"""How requests to `agentmesh serve` end: clients leave, workers die, models and doors refuse, Ctrl-C comes."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from agentmesh.celery.event_loop import run_sync
from agentmesh.journal.events import RunCancelled
from agentmesh.testing import FakeOpenAI, Fault, ValkeyServer
from agentmesh.testing.hosts import children


def run_of(served: Any, text: str) -> Any:
    """The newest run that was asked this."""
    runs = run_sync(served.journal.runs(limit=200))
    return next(r for r in runs if text in json.dumps(served.events(r.id)[0].task))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_run(served: Any, stream: bool, eventually: Any) -> None:
    served.model.faults.append(Fault(hang=True))
    text = f"leave{stream}"
    body = {"model": "openai:fake", "messages": [{"role": "user", "content": text}], "stream": stream}
    headers = {"Content-Type": "application/json", "Idempotency-Key": f"left{stream}"}
    leaves = http.client.HTTPConnection(served.url.removeprefix("http://"))
    leaves.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    eventually(lambda: any(r.body["messages"][-1]["content"] == text for r in served.model.requests))
    left = run_of(served, text)
    leaves.close()
    eventually(lambda: run_sync(served.journal.head(left.id)).status == "cancelled")
    (end,) = [e for e in served.events(left.id) if isinstance(e, RunCancelled)]
    assert end.by == "its client"
    # the same key again takes it up where it was
    said = served.ask(text, extra_headers={"Idempotency-Key": f"left{stream}"})
    assert said.choices[0].message.content == f"you said {text.upper()} to me"
    assert run_of(served, text).id == f"{left.id}~2"


def test_two_who_wait_for_one_run(served: Any, eventually: Any) -> None:
    served.model._latency_s = 1.0
    got: list[str] = []
    key = {"Idempotency-Key": "two"}
    stays = threading.Thread(
        target=lambda: got.append(served.ask("both", extra_headers=key).choices[0].message.content)
    )
    stays.start()
    eventually(lambda: served.model.requests)
    with pytest.raises(openai.APITimeoutError):
        served.ask("both", timeout=0.3, extra_headers=key)
    stays.join()
    assert got == ["you said BOTH to me"]
    assert len(served.model.requests) == 1


def test_a_retry_after_sent_tokens_ends_the_stream_with_an_error(served: Any) -> None:
    served.model.faults.append(Fault(cut_after=400, drip_s=0.05))
    pieces = []
    with pytest.raises(openai.APIError, match="what was sent is void") as caught:
        for chunk in served.ask(stream=True, extra_headers={"Idempotency-Key": "void"}):
            pieces.append(chunk.choices[0].delta.content or "")
    assert "".join(pieces).startswith("you")
    assert caught.value.code == "retried"
    said = served.ask(extra_headers={"Idempotency-Key": "void"})
    assert said.choices[0].message.content == "you said TEA to me"


def test_a_model_that_refuses(served: Any) -> None:
    served.model.fail_next(400, body='{"error": {"message": "no such tool choice"}}')
    with pytest.raises(openai.InternalServerError, match="no such tool choice") as caught:
        served.ask()
    assert (caught.value.status_code, caught.value.code) == (502, "model_refused")
    assert caught.value.response.headers["x-should-retry"] == "false"
    served.model.fail_next(400, body='{"error": {"message": "context_length_exceeded"}}')
    with pytest.raises(openai.BadRequestError, match="longer than"):
        served.ask(stream=True)


def test_a_run_that_waits_for_a_person(served: Any) -> None:
    with pytest.raises(
        openai.ConflictError, match=r"is waiting for a decision: .* step 2 \(refund\): approve"
    ) as caught:
        served.ask("pay me", model="Payer")
    assert caught.value.code == "run_waiting"
    assert run_of(served, "pay me").status == "open"


def test_a_killed_worker_is_not_noticed(served: Any, eventually: Any) -> None:
    served.model._latency_s = 0.5
    got: list[str] = []
    asks = threading.Thread(target=lambda: got.append(served.ask("kill").choices[0].message.content))
    asks.start()
    eventually(lambda: served.model.requests)
    for pid in children(served.process.pid).values():
        os.kill(pid, signal.SIGKILL)
    asks.join()
    assert got == ["you said KILL to me"]


def test_what_is_refused_at_the_door(served: Any) -> None:
    good = {"model": "openai:fake", "messages": [{"role": "user", "content": "x"}]}
    assert served.raw(good)[0] == 200
    assert served.raw(good, **{"Content-Type": "text/plain"})[0] == 415  # what a web page may send unasked
    status, error = served.raw(good, Host="evil.example")
    assert (status, error["code"]) == (403, "host_refused")
    assert served.raw(b"{")[1]["message"].startswith("the body is not JSON")
    assert served.raw(b" " * (33 << 20))[0] == 413
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{served.url}/v1/completions", timeout=10)
    with caught.value as error:
        assert "POST /v1/chat/completions" in json.load(error)["error"]["message"]


def test_health_and_the_key(served: Any, tmp_path: Path, valkey: ValkeyServer, serve: Any) -> None:
    other = serve(tmp_path, valkey, served.model, "--key-env", "MESH_KEY", "--processes", "0", MESH_KEY="s3cret")
    try:
        with pytest.raises(openai.AuthenticationError):
            other.client.models.list()
        with other.client.with_options(api_key="s3cret") as client:
            assert client.models.list().data[0].id == "Desk"
        assert "s3cret" not in other.line
        with urllib.request.urlopen(f"{other.url}/health", timeout=10) as response:
            assert json.load(response) == {"ready": True, "workers": {"expected": 0, "ready": 0}, "journal": True}
    finally:
        other.close()


def test_where_a_key_is_needed(served: Any, tmp_path: Path) -> None:
    (tmp_path / "crew.py").write_text(served.crew)
    argv = [sys.executable, "-m", "agentmesh.cli.main", "serve", "crew.py", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(argv, cwd=tmp_path, env=served.env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, "--key-env AGENTMESH_KEY" in done.stderr) == (4, True)


def test_ctrl_c_leaves_runs_resumable(tmp_path: Path, valkey: ValkeyServer, eventually: Any, serve: Any) -> None:
    with FakeOpenAI(serve.answer, latency_s=20) as model:
        it = serve(tmp_path, valkey, model)
        caught: list[openai.APIStatusError] = []

        def ask() -> None:
            try:
                it.ask("later")
            except openai.APIStatusError as e:
                caught.append(e)

        asks = threading.Thread(target=ask)
        asks.start()
        eventually(lambda: model.in_flight == 1)
        code, said = it.stop(signal.SIGINT)
        asks.join()
        assert (code, "runs resume ID" in said) == (130, True)
        assert (caught[0].status_code, caught[0].code) == (503, "server_stops")
        (run_id,) = re.findall(r"run (\w+) continues", caught[0].message)
        assert run_sync(it.journal.head(run_id)).status == "open"
        model._latency_s = 0.0
        argv = [sys.executable, "-m", "agentmesh.cli.main", "runs", "resume", run_id]
        done = subprocess.run(argv, cwd=tmp_path, env=it.env, capture_output=True, text=True, timeout=40)
        assert done.stdout == "you said LATER to me\n", done.stderr
        it.close()
