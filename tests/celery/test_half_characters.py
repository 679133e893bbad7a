"""Text that UTF-8 does not have, half of a surrogate pair, from a tool, an error, a model or a caller: the run still ends."""

from collections.abc import Iterator
from typing import Any

import pytest

from agentmesh import Agent, Context, Crew, DefinitionError, RunFailedError, tool
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.testing import Reply, ScriptedModel

HALF = "caf\udce9"  # as os.listdir gives the name of a file in Latin-1
VALUES: dict[str, Any] = {"text": HALF, "list": [HALF], "key": {HALF: 1}}


@tool
def give(kind: str) -> Any:
    """A value with such text."""
    return VALUES[kind]


@tool
def fail(kind: str) -> str:
    """An error with such text."""
    raise OSError(f"there is no {HALF}")


class Gives(Agent[Any]):
    def flow(self, task: str, ctx: Context) -> Any:
        return ctx.do(fail.on(task) if task == "error" else give.on(task))


class Raises(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        raise ValueError(HALF)


class Returns(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return HALF


class Says(Agent):
    model = ScriptedModel(lambda prompt: Reply("\ud83d\ude00 " + HALF))


@pytest.fixture
def mesh(valkey: Any) -> Iterator[Mesh]:
    crew = Crew(Gives(), Raises(), Returns(), Says(), name="halves")
    it = Mesh(crew, config=Config(broker=valkey.broker_url, journal=valkey.url))
    with it.worker():
        yield it
    it.close()


@pytest.mark.parametrize(
    ("agent", "task", "sentence"),
    [
        (Gives(), "text", "tool `give` returned .* is not JSON: .*surrogates not allowed"),
        (Gives(), "list", "tool `give` returned .* is not JSON: .*surrogates not allowed"),
        (Gives(), "key", "tool `give` returned .* is not JSON: .*surrogates not allowed"),
        (Gives(), "error", "there is no caf\ufffd"),
        (Raises(), "x", "ValueError: caf\ufffd"),
        (Returns(), "x", "is not JSON: .*surrogates not allowed"),
    ],
)
def test_the_run_fails_and_says_why(mesh: Mesh, agent: Agent[Any, Any], task: str, sentence: str) -> None:
    with pytest.raises(RunFailedError, match=sentence):
        mesh.run(agent, task, timeout_s=20)


def test_a_model_that_says_one(mesh: Mesh) -> None:
    assert mesh.run(Says(), "x", timeout_s=20) == "\U0001f600 caf\ufffd"


def test_a_task_with_one(mesh: Mesh) -> None:
    with pytest.raises(DefinitionError, match="the task of agent `Gives`: .* is not JSON: .*surrogates not allowed"):
        mesh.run(Gives(), HALF)
