"""Unreachable model servers: the steps of their queue wait, without using up retries, and not for ever."""

from collections.abc import Callable

import pytest

from agentmesh import Agent, Crew, DefinitionError, ModelError, Queue, RunFailedError, ServerQueue
from agentmesh.engine.run import Run
from agentmesh.journal.events import Event, StepRetried
from agentmesh.message import Message
from agentmesh.model import Answer, Prompt, RetryLater
from agentmesh.testing import FakeMesh

URL = "http://gpu1:8000/v1"


class Reader(Agent[str]):
    model = "local:m"
    retries = 1


def begun(answers: Callable[[int], str], *, timeout_s: float = 600) -> Run[str]:
    """A run whose servers are `away`, `busy` or say something, by how often they were asked."""
    asked = 0

    class Servers:
        async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
            nonlocal asked
            asked += 1
            said = answers(asked)
            if said in ("away", "busy"):
                raise RetryLater(ModelError(f"they are {said}"), 5.0, away=said == "away")
            return Answer(Message("assistant", said))

        async def close(self) -> None: ...

    crew = Crew(Reader(), queues=[ServerQueue("gpu", model="m", urls=URL, unavailable_timeout_s=timeout_s)])
    return FakeMesh(crew, model=Servers()).start("read")


def waits_s(events: list[Event]) -> list[float]:
    return [e.after_ms / 1000 for e in events if isinstance(e, StepRetried)]


def test_a_step_waits_longer_and_longer_and_keeps_its_retries() -> None:
    run = begun(lambda asked: "away" if asked <= 6 else "busy" if asked == 7 else "tea")
    assert run.result(timeout_s=0) == "tea"
    waits = waits_s(run.events())
    for wait, most in zip(waits, (4, 8, 16, 30, 30, 30), strict=False):
        assert most / 2 <= wait <= most
    assert waits[6:] == [5.0]


def test_it_does_not_wait_for_ever() -> None:
    run = begun(lambda asked: "away")
    with pytest.raises(RunFailedError, match="they are away"):
        run.result(timeout_s=0)
    *waits, last = waits_s(run.events())
    assert last == 5.0  # its retry
    assert 600 <= sum(waits) < 600 + 30


def test_a_queue_may_have_it_wait_for_nothing() -> None:
    run = begun(lambda asked: "away", timeout_s=0)
    with pytest.raises(RunFailedError, match="they are away"):
        run.result(timeout_s=0)
    assert waits_s(run.events()) == [5.0]


def test_waiting_for_servers_wants_servers() -> None:
    with pytest.raises(DefinitionError, match=r"write ServerQueue\('gpu', urls=\[.*\], unavailable_timeout_s=5\)"):
        Queue("gpu", unavailable_timeout_s=5)  # type: ignore[call-arg]  # the mistake
    with pytest.raises(DefinitionError, match="unavailable_timeout_s=-1 is not a time; write seconds"):
        ServerQueue("gpu", urls=URL, unavailable_timeout_s=-1)
