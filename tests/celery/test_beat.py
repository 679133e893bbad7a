"""Two beats, one start a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from agentmesh.config import Config
from agentmesh.worker.asyncio_worker import worker_command
from agentmesh.worker.supervisor import Supervisor

HERE = Path(__file__).parent


CREW = """
from agentmesh import Agent, Crew, Schedule
from agentmesh.testing import ScriptedModel, says

class Echo(Agent):
    "Says what it is told."

crew = Crew(Echo(), name="beaten", model=ScriptedModel(lambda p: says(p.messages[-1].text)),
            schedules=[Schedule(1.0, Echo(), "tick", name="tick")])
"""


def test_a_worker_of_ours_beats(valkey: Any, tmp_path: Path, eventually: Any) -> None:
    (tmp_path / "beaten.py").write_text(CREW)
    config = Config(broker=valkey.broker_url, journal=valkey.url, sweep_s=0.2, drain_s=1.0)
    argv = worker_command(config, crews=[str(tmp_path / "beaten.py")], queues=[], concurrency=0, beat=True)
    supervisor = Supervisor([argv] * 2, drain_s=2, output=subprocess.DEVNULL)
    supervisor.start()
    try:
        with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
            eventually(lambda: client.zcard("agentmesh:forget") >= 2)  # ended runs
    finally:
        supervisor.stop(now=True)
        supervisor.join(10)


def test_two_beats_begin_each_run_once(
    valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    env = {**os.environ, "THEIR_BROKER": valkey.broker_url, "THEIR_BACKEND": valkey.broker_url,
           "THEIR_JOURNAL": valkey.url, "THEIR_LOG": str(tmp_path / "log"),
           "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}  # fmt: skip
    logs, beats = [tmp_path / f"beat{i}.log" for i in range(2)], []
    for i, log in enumerate(logs):
        argv = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "their_app",
            "beat",
            "-l",
            "info",
            "-s",
            str(tmp_path / f"s{i}"),
            "--pidfile=",
        ]
        with log.open("wb") as out:
            beats.append(subprocess.Popen(argv, stdout=out, stderr=out, env=env))
    try:
        eventually(lambda: all(log.read_text().count("Sending due task") >= 3 for log in logs))
    finally:
        for beat in beats:
            beat.send_signal(signal.SIGTERM)
            beat.wait(10)
    sent = sum(log.read_text().count("Sending due task agentmesh.inside.tick") for log in logs)
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        runs = sorted(client.zrange("agentmesh:runs", 0, -1))
        assert all(client.lrange(f"agentmesh:ev:{run}", 0, -1)[0].count("RunStarted") == 1 for run in runs)
        messages = client.llen("agentmesh.inside.main")
    assert len(runs) < sent  # both beats had a word about the same times
    assert messages == len(runs)  # and none was sent for a time that had begun
    seconds = [int(run[-3:-1]) for run in runs]
    assert all((b - a) % 60 == 1 for a, b in zip(seconds, seconds[1:], strict=False)), runs
    assert not [line for log in logs for line in log.read_text().splitlines() if "ERROR" in line]
