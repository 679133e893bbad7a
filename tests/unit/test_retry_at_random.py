"""Retries of runs that fail anywhere, time and again: each call succeeds once."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from agentmesh import Agent, Context, Crew, Limits, StepError, tool
from agentmesh.testing import FakeMesh

BROKEN: set[str] = set()
WELL: Counter[str] = Counter()  # good ends


@pytest.fixture(autouse=True)
def _fresh() -> None:
    BROKEN.clear()
    WELL.clear()


@tool(retries=0)
def work(what: str) -> str:
    """Works, unless it is broken."""
    if what in BROKEN:
        raise RuntimeError(f"{what} is broken")
    WELL[what] += 1
    return what.upper()


class Walker(Agent[list[Any]]):
    """Does what its task says: `"x"` a call, `["~", …]` a sub-agent, `[…]` side by side."""

    def flow(self, task: list[Any], ctx: Context) -> list[Any]:
        out: list[Any] = []
        for item in task:
            if isinstance(item, str):
                out.append(ctx.do(work.on(item)))
            elif item[0] == "~":
                out.append(ctx.do(Walker().on(item[1:])))
            else:
                steps = [work.on(x) if isinstance(x, str) else Walker().on(x) for x in item[1:]]
                got = ctx.gather(steps, errors=True, window=item[0])
                for one in got:
                    if isinstance(one, StepError):
                        raise one
                out.append(got)
        return out


def a_task(rng: random.Random, names: Iterator[int], depth: int = 0) -> list[Any]:
    """Calls, sub-agents and gathers of both, at most three deep."""

    def child() -> Any:
        return a_task(rng, names, depth + 1) if depth < 2 and rng.random() < 0.5 else f"c{next(names)}"

    out: list[Any] = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["call", "agent", "gather", "gather"])
        if kind == "gather":
            out.append([rng.choice([0, 1, 2]), *[child() for _ in range(rng.randint(2, 4))]])
        elif kind == "agent" and depth < 2:
            out.append(["~", *a_task(rng, names, depth + 1)])
        else:
            out.append(f"c{next(names)}")
    return out


@pytest.mark.parametrize("seed", range(40))
def test_however_often_it_fails_each_call_succeeds_once(seed: int) -> None:
    rng = random.Random(seed)
    names = itertools.count()
    task = a_task(rng, names)
    crew = Crew(Walker(), limits=Limits(depth=9))
    wanted = FakeMesh(crew).run(task)
    calls = [f"c{n}" for n in range(next(names))]
    WELL.clear()
    BROKEN.update(x for x in calls if rng.random() < 0.3)
    run = FakeMesh(crew, workers=rng.choice([1, 3])).start(task, run_id="r")
    while run.status() == "failed":
        if rng.random() < 0.7:
            BROKEN.discard(rng.choice(sorted(BROKEN)))
        run = run.retry()
    assert run.result() == wanted
    assert {x: 1 for x in calls} == WELL
