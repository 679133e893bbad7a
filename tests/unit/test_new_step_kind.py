"""Four kinds of steps that agentmesh does not know, one for each lane, in this one file: here in memory.

The file is a crew file too: tests/celery/journals/test_new_step_kind.py runs it with a worker process on a real Valkey.
"""

import base64
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest

from agentmesh import Agent, Context, Crew, RunFailedError, StepError, ToolContext, TryAgain
from agentmesh.cli.run_view import describe_event
from agentmesh.definitions.step import Lane, Step, StepPolicy
from agentmesh.journal.events import StepDone, StepPlanned, StepRetried
from agentmesh.testing import FakeMesh

FETCHED: Counter[str] = Counter()
FAILING: set[str] = set()


def fetch(url: str, key: str) -> bytes:
    FETCHED[url] += 1
    if url in FAILING:
        raise OSError(f"{url} does not answer")
    return f"{url} for {key}".encode()


@dataclass(frozen=True)
class Fetch(Step[bytes]):
    """A worker does it: by a function of its own, with bytes for a value."""

    kind: ClassVar[str] = "Fetch"
    url: str = ""

    def policy(self) -> StepPolicy:
        return StepPolicy(timeout_s=5, retries=2, max_output_bytes=200)

    def bind(self, context: ToolContext) -> Callable[[], Any]:
        return partial(fetch, self.url, context.key)

    def encode(self, value: bytes) -> str:
        return base64.b64encode(value).decode()

    def decode(self, value: str) -> bytes:
        return base64.b64decode(value)


@dataclass(frozen=True)
class Signal(Step[dict[str, Any]]):
    """Somebody outside gives it a value."""

    kind: ClassVar[str] = "Signal"
    lane: ClassVar[Lane] = "held"
    about: str = ""

    def policy(self) -> StepPolicy:
        return StepPolicy(held=f"signal:{self.name}")

    def decode(self, value: Any) -> dict[str, Any]:
        return dict(value)

    def describe(self) -> Any:
        return {"about": self.about}


@dataclass(frozen=True)
class Tomorrow(Step[str]):
    """The clock ends it."""

    kind: ClassVar[str] = "Tomorrow"
    lane: ClassVar[Lane] = "due"

    def policy(self) -> StepPolicy:
        return StepPolicy(due_in_s=float(os.environ.get("TOMORROW_S", 86_400)))

    def decode(self, value: Any) -> str:
        return "morning"


@dataclass(frozen=True)
class Opinion(Step[list[str]]):
    """A run of another agent ends it."""

    kind: ClassVar[str] = "Opinion"
    lane: ClassVar[Lane] = "child"

    def child(self) -> tuple[Any, Any]:
        return Expert(), "what do you think?"

    def decode(self, value: str) -> list[str]:
        return value.split()


class Expert(Agent[str]):
    def flow(self, task: str, ctx: Context) -> str:
        return f"well {task}"


class Order(Agent[list[Any]]):
    team = (Expert(),)

    def flow(self, task: str, ctx: Context) -> list[Any]:
        page = ctx.do(Fetch("page", "a"))
        paid = ctx.do(Signal("paid", f"order {task}"))
        ctx.do(Tomorrow("wait"))
        both = ctx.gather([Fetch("left", "b"), Opinion("Expert"), Fetch("right", "c")])
        return [page.decode(), paid["by"], both[1], [b.decode() for b in (both[0], both[2])]]


VALUE = ["a for r/1", "ana", ["well", "what", "do", "you", "think?"], ["b for r/4", "c for r/6"]]
crew = Crew(Order(), name="kinds", model="openai:none")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    FETCHED.clear()
    FAILING.clear()


def test_a_run_of_new_kinds_from_begin_to_end() -> None:
    mesh = FakeMesh(crew)
    run = mesh.start("7", run_id="r")
    (item,) = run.waiting_for()
    assert (item.n, item.name, dict(item.args), item.why) == (2, "paid", {"about": "order 7"}, "signal:paid")
    run.resolve(item, "done", value={"by": "ana"})
    assert run.result() == VALUE
    planned = [(e.kind, e.name, e.lane) for e in run.events() if isinstance(e, StepPlanned)]
    assert planned == [
        ("Fetch", "page", "queued"), ("Signal", "paid", "held"), ("Tomorrow", "wait", "due"),
        ("Fetch", "left", "queued"), ("Opinion", "Expert", "child"), ("Fetch", "right", "queued"),
    ]  # fmt: skip
    shown = [describe_event("r", e) for e in run.events()]
    assert any(line.endswith("  2 Signal paid") for line in shown)
    assert mesh.runner.now_ms >= 1_000_000 + 86_400_000


def test_its_function_fails_as_a_tool_does() -> None:
    FAILING.add("b")
    mesh = FakeMesh(crew)
    run = mesh.start("7", run_id="r")
    run.resolve(run.waiting_for()[0], "done", value={"by": "ana"})
    with pytest.raises(RunFailedError, match="Fetch `left` raised OSError: b does not answer"):
        run.result()
    assert FETCHED == {"a": 1, "b": 3, "c": 1}  # two retries
    assert sum(isinstance(e, StepRetried) for e in run.events()) == 2


def test_a_retry_of_the_run_keeps_what_was_done() -> None:
    FAILING.add("b")
    mesh = FakeMesh(crew)
    run = mesh.start("7", run_id="r")
    run.resolve(run.waiting_for()[0], "done", value={"by": "ana"})
    FAILING.clear()
    again = run.retry()
    assert again.result() == VALUE  # the keys are those of the first run
    assert FETCHED == {"a": 1, "b": 4, "c": 1}
    assert [e.n for e in again.events() if isinstance(e, StepDone)] == [1, 5, 6, 4]


def test_a_signal_that_failed_is_asked_for_again_in_a_retry() -> None:
    mesh = FakeMesh(crew)
    run = mesh.start("7", run_id="r")
    run.resolve(run.waiting_for()[0], "failed", by="ana")
    with pytest.raises(RunFailedError, match="step 2, paid: ana reported that it failed"):
        run.result()
    again = run.retry()
    (item,) = again.waiting_for()
    assert (item.run_id, item.n, item.why) == ("r~2", 2, "signal:paid")
    again.resolve(item, "done", value={"by": "ana"})
    assert again.result() == VALUE


@pytest.mark.parametrize("decision", ["approve", "deny", "revive", "retry"])
def test_a_signal_takes_no_decision_but_its_own(decision: str) -> None:
    """A worker can do nothing for it: were it queued, it would be claimed and never end."""
    mesh = FakeMesh(crew)
    run = mesh.start("7", run_id="r")
    (item,) = run.waiting_for()
    with pytest.raises(Exception, match="step 2 of run r is not waiting for this"):
        run.resolve(item, "retry") if decision == "retry" else getattr(run, decision)(item)
    assert run.waiting_for() == [item]


def test_what_a_person_ends_waits_for_approval_unless_it_says_for_what() -> None:
    @dataclass(frozen=True)
    class Nod(Step[str]):
        kind: ClassVar[str] = "Nod"
        lane: ClassVar[Lane] = "held"

        def decode(self, value: Any) -> str:
            return "approved" if value is None else str(value)

    class Asks(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(Nod("n"))

    run = FakeMesh(Asks()).start("x")
    (item,) = run.waiting_for()
    assert item.why == "approve"
    run.approve(item)
    assert run.result() == "approved"


def test_a_function_may_speak_to_whoever_asked() -> None:
    @dataclass(frozen=True)
    class Fussy(Step[str]):
        kind: ClassVar[str] = "Fussy"

        def bind(self, context: ToolContext) -> Callable[[], Any]:
            async def call() -> Any:
                if self.name == "rude":
                    raise TryAgain("say please")
                return {"too": "x" * 300} if self.name == "long" else object()

            return call

        def policy(self) -> StepPolicy:
            return StepPolicy(max_output_bytes=100)

        def decode(self, value: Any) -> str:
            return str(value)

    class Asks(Agent[list[str]]):
        def flow(self, task: str, ctx: Context) -> list[str]:
            ended = ctx.gather([Fussy("rude"), Fussy("long"), Fussy("odd")], errors=True)
            assert all(isinstance(e, StepError) for e in ended)
            return [str(e) for e in ended]

    rude, long, odd = FakeMesh(Asks()).run("x")
    assert rude == "say please"
    assert long.startswith("Fussy `long` returned 310 bytes of JSON and max_output_bytes is 100")
    assert odd.startswith("Fussy `odd` returned ")
    assert "is not JSON" in odd


def test_what_a_kind_does_not_say_is_an_error_that_names_it() -> None:
    @dataclass(frozen=True)
    class Bare(Step[str]):
        kind: ClassVar[str] = "Bare"

    class Asks(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(Bare("b"))

    with pytest.raises(RunFailedError, match=r"Bare\.bind: a step of lane 'queued' says what a worker calls"):
        FakeMesh(Asks()).run("x")
