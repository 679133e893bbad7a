"""Every notebook is stripped in git, and runs from its first cell to its last."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))

# the kernel's client leaves sockets to the collector, and warns of its own event loop policy
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path: Path, tmp_path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "strip it: nbstripout notebooks/*.ipynb"
    root = str(path.parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, f"{root}/agents", f"{root}/tools"])}
    notebook = nbformat.reads(path.read_text(), as_version=4)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute(env=env)


CELLS = [
    """
from agentmesh import Agent, MeshError
from agentmesh.testing import FakeMesh, says


class Echo(Agent):
    pass


mesh = FakeMesh(Echo(), model=lambda prompt: says(prompt.messages[-1].text))
assert mesh.run("a cell's own line") == "a cell's own line"
""",
    """
def helper(text):
    return mesh.run(text)


assert [helper(text) for text in ("a", "b")] == ["a", "b"]
assert list(mesh.start("by token").tokens()) == ["by", " token"]
""",
    """
async def careless():
    return mesh.run("x")


try:
    await careless()
except MeshError as error:
    assert error.hint == "write `await mesh.aio.run(…)`", error.hint
else:
    raise AssertionError("it blocked the kernel's loop")
""",
    """
run = await mesh.begin(Echo(), "awaited")
assert (await run, mesh.run("and plain beside it")) == ("awaited", "and plain beside it")
""",
]


def test_a_cell_may_wait_and_a_coroutine_in_it_may_not() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    root = str(Path(__file__).resolve().parents[2])
    NotebookClient(notebook, timeout=60).execute(env={**os.environ, "PYTHONPATH": root})
