"""The place in the code of an exception of a flow, in the error of the run and of a sub-agent's run."""

import json
from pathlib import Path

import pytest

from agentmesh import Agent, Context, RunFailedError
from agentmesh.errors import raised_at
from agentmesh.journal.events import RunFailed as Failed
from agentmesh.testing import FakeMesh

HERE = Path(__file__)


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(HERE.read_text().splitlines(), 1) if line.strip() == text)


def prices(text: str) -> dict[str, int]:
    return dict(json.loads(text))  # a library's exception


class Buyer(Agent[int]):
    def flow(self, task: str, ctx: Context) -> int:
        return prices(task)["tea"]  # our own


class Lead(Agent[int]):
    team = (Buyer(),)

    def flow(self, task: str, ctx: Context) -> int:
        return int(ctx.do(Buyer().on(task)))


@pytest.mark.parametrize(
    ("task", "said", "line"),
    [
        ("{}", "KeyError: 'tea'", 'return prices(task)["tea"]  # our own'),
        ("{", "JSONDecodeError: Expecting .*", "return dict(json.loads(text))  # a library's exception"),
    ],
)
def test_the_line_is_told(task: str, said: str, line: str) -> None:
    place = rf"{said} \({HERE.name}:{line_of(line)}\)$"
    run = FakeMesh(Buyer()).start(task)
    with pytest.raises(RunFailedError, match=f"^run r1 failed: {place}"):
        run.result()
    end = run.events()[-1]
    assert isinstance(end, Failed)
    assert end.error["at"] == f"{HERE.name}:{line_of(line)}"
    with pytest.raises(RunFailedError, match=f"`Buyer` failed: {place}"):
        FakeMesh(Lead()).run(task)


def test_what_came_from_nowhere_has_no_line() -> None:
    assert raised_at(KeyError("k")) == ""
