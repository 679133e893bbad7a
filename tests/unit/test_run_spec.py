"""RunSpec is the payload of RunStarted: a new field is one line, and goes to children and retries by its rules."""

import asyncio
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from agentmesh import Agent, Context, Crew, RunFailedError, tool
from agentmesh.engine.run import Run
from agentmesh.journal import events
from agentmesh.journal.codec import decode_event, encode_event
from agentmesh.journal.run_spec import RunSpec, rules
from agentmesh.journal.types import NewRun
from agentmesh.schema import dumps
from agentmesh.testing import FakeMesh

BROKEN: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class RunStarted(events.RunStarted):
    """The event with three fields more: a line each."""

    tenant: str = field(default="", metadata=rules(child="inherit", retry="inherit"))
    note: str = field(default="", metadata=rules(child="reset", retry="reset"))
    spent: int = field(default=0, metadata=rules(child="inherit", retry="sum"))


@tool
def work(what: str) -> str:
    """Works, unless it is broken."""
    if what in BROKEN:
        raise RuntimeError(f"{what} is broken")
    return what.upper()


class Inner(Agent[str]):
    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(work.on(task))


class Outer(Agent[str]):
    team = (Inner(),)

    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(Inner().on(task))


def started(run: Run[Any]) -> RunStarted:
    (first, *_) = run.events()
    assert isinstance(first, RunStarted)
    return first


def test_a_new_field_goes_to_children_and_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(events.KINDS, "RunStarted", RunStarted)
    BROKEN.add("x")
    mesh = FakeMesh(Crew(Outer()))
    spec = RunStarted(crew=mesh.runner.crew.name, agent="Outer", task="x", tenant="acme", note="once", spent=3)
    asyncio.run(mesh.runner.begin(NewRun("r", spec, mesh.runner.dispatch.advance("r", "Outer", ""))))
    run = mesh.get("r")
    with pytest.raises(RunFailedError):
        run.result()
    assert (started(run).tenant, started(run).note, started(run).spent) == ("acme", "once", 3)
    child = mesh.get("r/1")
    assert (started(child).tenant, started(child).note, started(child).spent) == ("acme", "", 3)
    BROKEN.clear()
    again = run.retry()
    assert again.result() == "X"
    assert (started(again).tenant, started(again).note, started(again).spent) == ("acme", "", 3)
    assert started(mesh.get("r~2/1")).tenant == "acme"
    assert started(again).retry(spent=4).spent == 7


def test_what_each_field_is_in_a_child_and_in_a_retry() -> None:
    spec = RunSpec(
        crew="c", version="1", agent="A", task="t", fields={"x": 1}, history=[{}], limits={"turns": 3}, origin="f.py",
        stream=True, canvas={"id": "x"}, trace="00-1-2-01",
    )  # fmt: skip
    assert spec.child(agent="B", task="u", parent="r", parent_n=2) == RunSpec(
        crew="c", version="1", agent="B", task="u", parent="r", parent_n=2, limits={"turns": 3}, origin="f.py", stream=True,
        trace="00-1-2-01",
    )  # fmt: skip
    assert spec.retry(version="2", limits={}) == replace(spec, version="2", limits={}, canvas=None)


def test_every_field_says_its_rules() -> None:
    for f in fields(RunSpec):
        assert {f.metadata["child"], f.metadata["retry"]} <= {"given", "inherit", "reset", "sum"}, f.name


def test_it_is_spelled_as_ever() -> None:
    spec = RunSpec(crew="c", agent="A", task="t", fields={"x": 1}, parent="r", parent_n=2, stream=True)
    line = (
        '{"e":"RunStarted","crew":"c","agent":"A","task":"t","fields":{"x":1},"parent":"r","parent_n":2,"stream":true}'
    )
    assert encode_event(events.RunStarted.of(spec)) == line
    decoded = decode_event(f"5 {line}")
    assert isinstance(decoded, events.RunStarted)
    assert (decoded, decoded.at_ms) == (events.RunStarted.of(spec), 5)
    assert decoded.retry().at_ms == 5  # a retry is replayed from facts with their old times
    assert decoded.child(agent="B").at_ms == 0


@pytest.mark.parametrize(
    ("kind", "lane", "said"),
    [("Call", "queued", ""), ("Sleep", "due", "due"), ("Sleep", "queued", "queued"), ("Signal", "held", "held")],
)
def test_a_step_says_its_lane_where_its_absence_would_mean_another(kind: str, lane: Any, said: str) -> None:
    planned = events.StepPlanned(n=1, kind=kind, name="x", lane=lane)
    assert planned.to_json().get("lane", "") == said
    assert decode_event(f"0 {encode_event(planned)}") == planned


@pytest.mark.parametrize(
    ("kind", "lane"), [("Sleep", "due"), ("Approve", "held"), ("Delegate", "child"), ("Ask", "queued")]
)
def test_a_step_of_an_earlier_version_has_the_lane_of_its_kind(kind: str, lane: str) -> None:
    event = decode_event("0 " + dumps({"e": "StepPlanned", "n": 1, "kind": kind, "name": "x"}))
    assert isinstance(event, events.StepPlanned)
    assert event.lane == lane
