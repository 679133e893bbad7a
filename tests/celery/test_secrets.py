"""The broker's password is not on the command line of any process, where `ps` shows it to every user."""

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import redis

from agentmesh.config import Config
from agentmesh.testing.hosts import Host

CREW = """
import os
from agentmesh import Agent, Approve, Context, Crew, tool

@tool
def environment() -> str:
    "What a program that a tool starts would inherit."
    return repr(dict(os.environ))

class Desk(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        told = ctx.do(environment.on())
        ctx.do(Approve("look first"))
        return told

crew = Crew(Desk(), name="secretive", model="openai:fake")
"""
SECRET = secrets.token_hex(16)


def command_lines(among: Path = Path("/")) -> str:
    """Of all processes, or of those in a folder."""
    found = ""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (process / "cwd").readlink().is_relative_to(among):
                found += (process / "cmdline").read_text()
    return found


def test_no_command_line_holds_the_password(valkey: Any, tmp_path: Path, eventually: Any) -> None:
    (tmp_path / "crew.py").write_text(CREW)
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        client.acl_setuser(
            "eva", enabled=True, passwords=[f"+{SECRET}"], keys=["*"], channels=["*"], commands=["+@all"]
        )
    said = valkey.url.removeprefix("unix://").partition("?")[0]
    config = Config(broker=f"redis+socket://eva:{SECRET}@{said}?virtual_host=0", home=tmp_path, sweep_s=0.2)
    env = {**os.environ, "AGENTMESH_BROKER": config.broker, "AGENTMESH_HOME": str(tmp_path), "OPENAI_API_KEY": "k"}
    cli = [sys.executable, "-m", "agentmesh.cli.main"]
    subprocess.run([*cli, "run", "crew.py", "x", "--id", "s1", "--detach"], env=env, cwd=tmp_path, check=True)
    with Host(str(tmp_path / "crew.py"), config, env={"OPENAI_API_KEY": "k"}) as host:
        with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
            eventually(lambda: client.zcard("agentmesh:held"))
            (told,) = [line for line in client.lrange("agentmesh:ev:s1", 0, -1) if '"StepDone"' in line]
            assert "agentmesh.cli.run" in command_lines(tmp_path)
            assert "agentmesh.worker.asyncio_worker" in command_lines()
            assert SECRET not in command_lines()
            assert "AGENTMESH_WORKER_SPEC" not in told
        subprocess.run([*cli, "runs", "cancel", "s1"], env=env, cwd=tmp_path, check=True)
        assert host.stop() == 0
        eventually(lambda: not command_lines(tmp_path))
