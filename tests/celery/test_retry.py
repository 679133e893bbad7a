"""`agentmesh runs retry` with real workers: what was paid for is not asked again, also below and beside the journal."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from agentmesh import Agent, Context, Crew
from agentmesh.config import Config
from agentmesh.definitions.tool import tool
from agentmesh.mesh import Mesh
from agentmesh.testing import FakeOpenAI, says

CREW = """
from pathlib import Path
from agentmesh import *

@tool(retries=0)
def look(where: str) -> str:
    "Looks."
    if Path("broken").exists():
        raise RuntimeError(f"nothing to be seen in {where}")
    return where

class Helper(Agent):
    "Helps."

class Scout(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(Helper().on(f"{task} first")) + " " + ctx.do(look.on(task))

class Lead(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        notes = ctx.gather([Helper().on(f"{task} {i}") for i in range(3)])
        seen = ctx.gather([Scout().on("here"), Scout().on("there")], errors=True)
        for one in seen:
            if isinstance(one, StepError):
                raise one
        return ctx.do(Helper().on("the end")) + ": " + ", ".join([*notes, *seen])

crew = Crew(Lead(), Scout(), Helper(), model="openai:fake")
"""


def test_retry_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "crew.py").write_text(CREW)
    (tmp_path / "broken").touch()
    with FakeOpenAI(lambda body: says(body["messages"][-1]["content"].upper())) as server:
        env = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k"}

        def shell(*args: str, code: int = 0) -> tuple[str, str]:
            argv = [sys.executable, "-m", "agentmesh.cli.main", *args]
            done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
            assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
            return done.stdout, done.stderr

        def asked() -> list[str]:
            return sorted(r.body["messages"][-1]["content"] for r in server.requests)

        shell("run", "crew.py", "tea", "--id", "t", code=1)
        assert asked() == ["here first", "tea 0", "tea 1", "tea 2", "there first"]
        (tmp_path / "broken").unlink()
        out, err = shell("runs", "retry", "t")
        assert out == "THE END: TEA 0, TEA 1, TEA 2, HERE FIRST here, THERE FIRST there\n"
        assert "run t is retried as t~2" in err
        assert asked() == ["here first", "tea 0", "tea 1", "tea 2", "the end", "there first"]
        assert "nothing to retry" in shell("runs", "retry", "t", code=2)[1]
        (tmp_path / "broken").touch()
        shell("run", "crew.py", "cup", "--id", "u", code=1)
        (tmp_path / "broken").unlink()
        assert "is not a number" in shell("runs", "retry", "u", "--limit", "turns=many", code=2)[1]
        assert shell("runs", "retry", "u", "--limit", "turns=50", "--detach")[0] == "u~2\n"
        shell("runs", "tail", "u~2")
        shown = shell("runs", "show", "u~2")[0]
        assert "limits {'turns': 50.0}" in shown
        assert "RunDone" in shown
        assert "use 1 to 64 of: letters" in shell("run", "crew.py", "tea", "--id", "t~9", code=2)[1]


@tool
def big(size: int) -> str:
    """Makes much."""
    return "x" * size


@tool(retries=0)
def flaky(path: str) -> str:
    """Works when the file is there."""
    return Path(path).read_text()


class Maker(Agent[int]):
    def flow(self, task: str, ctx: Context) -> int:
        much = ctx.do(big.on(200_000))
        ctx.do(flaky.on(task))
        return len(much)


def test_large_values_come_along(valkey: Any, tmp_path: Path) -> None:
    mesh = Mesh(Crew(Maker(), name="maker"), config=Config(broker=valkey.broker_url, journal=valkey.url, sweep_s=0.05))
    with mesh.worker():
        run = mesh.start(Maker(), str(tmp_path / "gift"), run_id="m")
        run.wait(timeout_s=10)
        assert run.status() == "failed"
        (tmp_path / "gift").write_text("here")
        again = run.retry()
        assert again.result(timeout_s=10) == 200_000
        assert run.events()[1:3] == again.events()[1:3]
        assert [e.at_ms for e in run.events()[:3]] == [e.at_ms for e in again.events()[:3]]
    mesh.close()
