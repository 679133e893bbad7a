"""Following a run's whole tree: its events as they are written, and a picture of where it stands. Only reads."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from agentmesh.event import (
    ENDS,
    Event,
    RunDone,
    RunStarted,
    StepDone,
    StepFailed,
    StepPlanned,
    StepRetried,
)
from agentmesh.journal import Journal

LOOK_S = 0.1


async def follow(journal: Journal, run_id: str) -> AsyncIterator[tuple[str, Event]]:
    """Each event of the tree with its run, until the root's end; parents before children."""
    seen: dict[str, int] = {}
    over: set[str] = set()
    while run_id not in over:
        for member in await journal.tree(run_id):
            if member in over:
                continue
            for event in await journal.events(member, after=seen.get(member, 0)):
                seen[member] = seen.get(member, 0) + 1
                if isinstance(event, ENDS):
                    over.add(member)
                yield member, event
        if run_id not in over:
            await journal.watch(run_id, version=seen.get(run_id, 0), timeout_s=LOOK_S)


@dataclass(slots=True)
class Line:
    """One run of the tree, as it is shown."""

    run_id: str
    agent: str
    task: str = ""
    planned: int = 0
    ended: int = 0
    doing: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    batch: int = 0
    turns: int = 0
    retries: int = 0
    status: str = "open"
    started_ms: int = 0
    ended_ms: int = 0
    said: str = ""

    @property
    def depth(self) -> int:
        """0 for the root."""
        return self.run_id.count("/")


class Picture:
    """Where the tree stands, made from its events."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.began = time.monotonic()

    def add(self, run_id: str, event: Event) -> None:
        """Take one more event in."""
        if isinstance(event, RunStarted):
            task = event.task if isinstance(event.task, str) else str(event.task)
            self.lines[run_id] = Line(run_id, event.agent, " ".join(task.split())[:60], started_ms=event.at_ms)
            return
        line = self.lines[run_id]
        if isinstance(event, StepPlanned):
            line.planned += 1
            line.doing[event.n] = f"{event.kind} {event.name}"
        elif isinstance(event, StepDone | StepFailed):
            line.ended += 1
            line.doing.pop(event.n, None)
            line.tokens += int(event.usage.get("in", 0) + event.usage.get("out", 0))
            line.batch = max(line.batch, int(event.usage.get("batch", 0)))
            line.turns += 1 if event.usage else 0
        elif isinstance(event, StepRetried):
            line.retries += 1
        elif isinstance(event, ENDS):
            line.status = {"RunDone": "done", "RunFailed": "failed"}.get(type(event).__name__, "cancelled")
            line.ended_ms, line.said = event.at_ms, ""
            line.doing.clear()

    @property
    def tokens(self) -> int:
        """Of the whole tree."""
        return sum(line.tokens for line in self.lines.values())

    @property
    def elapsed_s(self) -> float:
        """Since watching began."""
        return time.monotonic() - self.began


def sentence(run_id: str, event: Event) -> str:
    """An event in one plain line."""
    name = type(event).__name__
    n = getattr(event, "n", None)
    parts = [f"{run_id:<14} {name:<12}", f"{n:>3}" if n else "   "]
    if isinstance(event, RunStarted):
        parts.append(f"{event.agent}: {_short(event.task)}")
    elif isinstance(event, StepPlanned):
        parts.append(f"{event.kind} {event.name}" + (f" (gather {event.gather})" if event.gather else ""))
    elif isinstance(event, StepDone):
        together = f", {int(event.usage['batch'])} at once" if event.usage.get("batch", 0) > 1 else ""
        tokens = int(event.usage.get("in", 0) + event.usage.get("out", 0))
        used = f"  [{tokens} tokens{together}]" if event.usage.get("in") else ""
        parts.append(_short(event.value) + used)
    elif isinstance(event, RunDone):
        parts.append(_short(event.value))
    elif hasattr(event, "error"):
        parts.append(f"{event.error['type']}: {event.error['message']}")
    else:
        told = {k: v for k, v in event.to_json().items() if k not in ("e", "n")}
        parts.append(", ".join(f"{k} {v}" for k, v in told.items()))
    return " ".join(parts).rstrip()


def _short(value: object, most: int = 90) -> str:
    if isinstance(value, dict) and "role" in value:
        calls = ", ".join(c[1] for c in value.get("tool_calls", ()))
        value = f"calls {calls}" if calls else value.get("text", "")
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
