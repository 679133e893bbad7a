"""Dispatch, which renders the messages of steps and runs; celery/dispatch.py implements it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentmesh.definitions.step import Lane
from agentmesh.journal.types import GatherPlan, TaskMessage


@dataclass(frozen=True, slots=True)
class MessageSpec:
    """What a message is about: a step, or the run that a step of lane `child` begins.

    Args:
        queue: the broker's name of it.
        timeout_s: of a function that a worker calls; a pool that can kill does so some time after it.
    """

    n: int
    kind: str
    lane: Lane
    name: str
    queue: str
    timeout_s: float | None = None


class Dispatch(Protocol):
    """Renders messages and sends nothing: the journal's scripts send, or a publisher."""

    def steps(
        self, run_id: str, members: Sequence[MessageSpec], gather: "GatherPlan | None", queue: str
    ) -> list[TaskMessage]:
        """One message a member, in order; `queue` is where the gather's body is sent."""
        ...

    def advance(self, run_id: str, agent: str, queue: str) -> TaskMessage:
        """The message that advances a run."""
        ...

    def finish(self, run_id: str, agent: str, queue: str) -> TaskMessage:
        """The message that reports a run's end to a canvas."""
        ...
