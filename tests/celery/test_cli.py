"""The command line as a user runs it: an embedded Valkey in a folder of the test's own, real worker processes."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agentmesh.testing import FakeOpenAI, says, uses

CREW = """
from agentmesh import *

@tool(approve=True)
def refund(order: int) -> str:
    "Refunds."
    return f"refunded {order}"

class Desk(Agent):
    "Answers."
    tools = (refund,)

class Helper(Agent):
    "Helps."

class Lead(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        notes = ctx.gather([Helper().on(f"{task} {i}") for i in range(3)])
        return ctx.do(Desk().on(task)) + " / " + ", ".join(notes)

crew = Crew(Lead(), Desk(), Helper(), model="openai:fake")
"""


def answer(body: dict[str, Any]) -> Any:
    last = body["messages"][-1]
    if last["role"] == "tool":
        return says(last["content"])
    if "tea cost" in last["content"]:
        return uses("price", item="tea")
    return (
        uses("refund", order=7) if body.get("tools") and "refund" in last["content"] else says(last["content"].upper())
    )


@pytest.fixture
def shell(shell: Any) -> Iterator[Any]:
    """The crew's file is there, and `server` answers its model."""
    (shell.folder / "crew.py").write_text(CREW)
    with FakeOpenAI(answer) as shell.server:
        shell.env |= {"OPENAI_BASE_URL": shell.server.url, "OPENAI_API_KEY": "k"}
        yield shell


def test_run_prints_the_answer_alone(shell: Any) -> None:
    assert shell("run", "crew.py", "tea", "--id", "t1") == "TEA / TEA 0, TEA 1, TEA 2\n"
    assert "Delegate Helper (gather 1)" in shell.err
    assert shell("run", "crew.py", "tea", "--id", "t1") == "TEA / TEA 0, TEA 1, TEA 2\n"
    assert len(shell.server.requests) == 4
    events = [json.loads(line) for line in shell("run", "crew.py", "cake", "--json").splitlines()]
    assert (events[0]["e"], events[-1]["e"]) == ("RunStarted", "RunDone")
    assert "done" in shell("runs", "ls")
    assert "GatherClosed" in shell("runs", "show", "t1")


def test_waiting_for_a_person(shell: Any) -> None:
    shell("run", "crew.py", "refund 7", "--id", "w1", code=3)
    assert "agentmesh runs approve w1/4 2" in shell.err
    shell("runs", "approve", "w1/4", "3", code=2)
    assert "is not waiting for this" in shell.err
    shell("runs", "approve", "w1/4", "2", "--by", "ana")
    assert shell("runs", "resume", "w1") == "refunded 7 / REFUND 7 0, REFUND 7 1, REFUND 7 2\n"
    shell("runs", "cancel", "w1", code=2)
    assert "has ended (done)" in shell.err


def test_ctrl_c_leaves_the_run_resumable(shell: Any, eventually: Any) -> None:
    shell.server._latency_s = 3.0  # a busy machine must hear the signal before the answers come
    process = shell.start("run", "crew.py", "tea", "--id", "c1")
    eventually(lambda: shell.server.in_flight >= 3, timeout_s=60)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "agentmesh runs resume c1" in err
    shell.server._latency_s = 0.0
    assert shell("runs", "resume", "c1") == "TEA / TEA 0, TEA 1, TEA 2\n"


def keepers_in(folder: Path) -> list[str]:
    """The processes that `--detach` left in this folder."""
    found = subprocess.run(["pgrep", "-f", "agentmesh.cli.run"], capture_output=True, text=True, check=False)
    here = []
    for pid in found.stdout.split():
        with suppress(OSError):  # it has left meanwhile
            here += [pid] if os.readlink(f"/proc/{pid}/cwd") == str(folder) else []
    return here


def test_a_detached_run_needs_no_client(shell: Any, eventually: Any) -> None:
    assert shell("run", "crew.py", "tea", "--id", "d1", "--detach") == "d1\n"
    shell("runs", "tail", "d1")
    assert "RunDone" in shell("runs", "show", "d1")
    eventually(lambda: not keepers_in(shell.folder))
    assert (shell.folder / ".agentmesh" / "detached.log").read_text() == ""


def test_a_worker_that_does_not_leave_is_no_news_after_the_answer(shell: Any) -> None:
    stubborn = "import signal, sys\nif '--ready-fd' in sys.argv:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    (shell.folder / "stubborn.py").write_text(stubborn + CREW)
    assert shell("run", "stubborn.py", "tea") == "TEA / TEA 0, TEA 1, TEA 2\n"
    assert shell.err.splitlines()[-1].split()[1] == "RunDone", shell.err


def test_a_worker_killed_in_front_of_your_eyes(shell: Any, eventually: Any) -> None:
    shell.server._latency_s = 0.7
    process = shell.start("run", "crew.py", "tea", "--id", "k1")
    eventually(lambda: shell.server.in_flight >= 3, timeout_s=60)
    killed = subprocess.run(
        ["pkill", "-9", "-P", str(process.pid), "-f", "agentmesh.worker.asyncio_worker"], check=False
    )
    assert killed.returncode == 0
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "TEA / TEA 0, TEA 1, TEA 2\n"), err


def test_wrong_use_says_what_is_wrong(shell: Any) -> None:
    shell("run", "none.py", "x", code=2)
    assert shell.err.startswith("error: file 'none.py' does not exist\nhelp: ")
    shell("run", "crew.py", "x", "--broker", "redis://127.0.0.1:1/0", code=4)
    assert "no broker responds at redis://127.0.0.1:1/0" in shell.err
    shell("runs", "show", "nope", code=2)
    assert "there is no run 'nope'" in shell.err
    shell("run", "crew.py", "x", "--id", "a/b", code=2)
    del shell.env["OPENAI_BASE_URL"], shell.env["OPENAI_API_KEY"]
    shell("run", "crew.py", "x", "--id", "nokey", code=4)
    assert "OPENAI_API_KEY is not set" in shell.err
    shell("runs", "show", "nokey", code=2)  # nothing half-started is left behind
    shell("worker", "crew.py", "--queue", "mian", code=2)
    assert "Did you mean 'main'?" in shell.err


def test_what_new_makes_runs_with_another_model(shell: Any) -> None:
    shell("new", "shop")
    crew = shell.folder / "shop" / "crew.py"
    crew.write_text(crew.read_text().replace('"local:smollm2"', '"openai:fake"'))
    assert shell("run", "shop/crew.py", "What does tea cost?") == "4.5\n"


def test_doctor(shell: Any) -> None:
    shell.env["AGENTMESH_MODEL"] = "openai:fake"
    out = shell("doctor", "crew.py")
    assert "append-only file on" in out
    assert "crew 'crew': agents Lead, Desk, Helper" in out
