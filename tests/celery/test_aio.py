"""`agentmesh.run` and `agentmesh.aio` over an embedded Valkey, in programs of their own."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio

from agentmesh import Agent, MeshError, aio, run
from agentmesh.testing import ScriptedModel, says


class Echo(Agent):
    model = ScriptedModel(lambda prompt: says(prompt.messages[-1].text.upper()))


async def main():
    try:
        run(Echo(), "x")
    except MeshError as error:
        print(error.hint)
    print(*await asyncio.gather(aio.run(Echo(), "a"), aio.run(Echo(), "b")))
    handle = await aio.start(Echo(), "c d", run_id="third")
    print([text async for text in handle.tokens()], await handle, (await handle.head()).crew)


asyncio.run(main())
"""


PLAIN = """
from agentmesh import Agent, run
from agentmesh.testing import ScriptedModel, says


class Echo(Agent):
    model = ScriptedModel(lambda prompt: says(prompt.messages[-1].text.upper()))


print(run(Echo(), "x"))
"""


def test_a_plain_program_ends_without_a_word(tmp_path: Path) -> None:
    """Its worker is stopped when the interpreter is already shutting down and no thread may be started."""
    file = tmp_path / "poets.py"
    file.write_text(PLAIN)
    env = {**os.environ, "AGENTMESH_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, str(file)], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "X\n", "")


def test_a_program_awaits_run_and_start(tmp_path: Path) -> None:
    file = tmp_path / "poets.py"
    file.write_text(PROGRAM)
    env = {**os.environ, "AGENTMESH_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, str(file)], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    # the crew is named after the file, although `gather` runs each call in a task of its own
    assert done.stdout.splitlines() == ["write `await agentmesh.aio.run(…)`", "A B", "['C', ' D'] C D poets"]
