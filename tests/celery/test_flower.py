"""Flower shows what a person can read: the agent and the step's kind as the name, run and step as the arguments."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_flower_shows_readable_names(
    valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "THEIR_BROKER": valkey.broker_url, "THEIR_BACKEND": valkey.broker_url, "THEIR_JOURNAL": valkey.url,
        "THEIR_LOG": str(tmp_path / "log"), "FLOWER_UNAUTHENTICATED_API": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    monkeypatch.syspath_prepend(str(HERE))
    sys.modules.pop("their_app", None)
    celery = [sys.executable, "-m", "celery", "-A", "their_app"]
    worker = ["worker", "-E", "-P", "threads", "-c", "4", "-Q", "agentmesh.inside.main", "--without-mingle"]
    flower = ["flower", f"--port={port}", "--address=127.0.0.1"]
    with (tmp_path / "out").open("wb") as out:
        processes = [
            subprocess.Popen([*celery, *what], stdout=out, stderr=out, cwd=tmp_path) for what in (flower, worker)
        ]

    def tasks() -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/tasks", timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (urllib.error.URLError, ConnectionError):
            return {}

    def up() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/workers?refresh=1", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    import their_app

    try:
        eventually(up)
        assert their_app.mesh.start(their_app.Team(), "a", run_id="tea-7").result(timeout_s=20) == "<a0,a1,a2,a3>"
        eventually(lambda: "Echo.ask" in {t["name"] for t in tasks().values() if t["state"] == "SUCCESS"})
        shown = {(t["name"], t["args"]) for t in tasks().values()}
        assert {("work.call", "tea-7 step 1"), ("Echo.ask", "tea-7/5 step 1"), ("Team.advance", "tea-7")} <= shown
    except BaseException:
        print((tmp_path / "out").read_text())
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()
        their_app.mesh.close()
        their_app.app.close()
