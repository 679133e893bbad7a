"""Shows a run and its sub-agents' runs as a live tree, as plain lines or as JSON."""

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from agentmesh.journal.events import ENDS, Event, RunDone, RunStarted, StepDone, StepFailed, StepPlanned, StepRetried
from agentmesh.journal.types import Token
from agentmesh.schema import to_json


@dataclass(slots=True)
class Line:
    """One run of the tree, as shown in one line."""

    run_id: str
    agent: str
    task: str = ""
    planned: int = 0
    ended: int = 0
    running: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    batch: int = 0
    turns: int = 0
    retries: int = 0
    status: str = "open"
    started_ms: int = 0
    ended_ms: int = 0
    streamed: str = ""  # the end of the live text

    @property
    def depth(self) -> int:
        """0 for the root."""
        return self.run_id.count("/")


class TreeState:
    """The state of the tree, made from its events."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.started_s = time.monotonic()

    def add(self, run_id: str, event: Event) -> None:
        """Apply one more event."""
        if isinstance(event, RunStarted):
            task = event.task if isinstance(event.task, str) else str(event.task)
            self.lines[run_id] = Line(run_id, event.agent, " ".join(task.split())[:60], started_ms=event.at_ms)
            return
        line = self.lines[run_id]
        if isinstance(event, StepPlanned):
            line.planned += 1
            line.running[event.n] = f"{event.kind} {event.name}"
        elif isinstance(event, StepDone | StepFailed):
            line.ended += 1
            line.running.pop(event.n, None)
            line.tokens += int(event.usage.get("in", 0) + event.usage.get("out", 0))
            line.batch = max(line.batch, int(event.usage.get("batch", 0)))
            line.turns += 1 if event.usage else 0
        elif isinstance(event, StepRetried):
            line.retries += 1
        elif isinstance(event, ENDS):
            line.status = {"RunDone": "done", "RunFailed": "failed"}.get(type(event).__name__, "cancelled")
            line.ended_ms, line.streamed = event.at_ms, ""
            line.running.clear()

    @property
    def tokens(self) -> int:
        """Of the whole tree."""
        return sum(line.tokens for line in self.lines.values())

    @property
    def elapsed_s(self) -> float:
        """Seconds since this view was made."""
        return time.monotonic() - self.started_s


def describe_event(run_id: str, event: Event) -> str:
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
        details = [event.model] if event.model else []
        details += [f"{tokens} tokens{together}"] if event.usage.get("in") else []
        parts.append(_short(event.value) + (f"  [{', '.join(details)}]" if details else ""))
    elif isinstance(event, RunDone):
        parts.append(_short(event.value))
    elif hasattr(event, "error"):
        parts.append(f"{event.error['type']}: {event.error['message']}")
    else:
        rest = {k: v for k, v in event.to_json().items() if k not in ("e", "n")}
        parts.append(", ".join(f"{k} {v}" for k, v in rest.items()))
    return " ".join(parts).rstrip()


def _short(value: object, most: int = 90) -> str:
    if isinstance(value, dict) and "role" in value:
        calls = ", ".join(c[1] for c in value.get("tool_calls", ()))
        value = f"calls {calls}" if calls else value.get("text", "")
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


# ---- Views ---------------------------------------------------------------------------------------

MARKS = {"open": ("●", "cyan"), "done": ("✔", "green"), "failed": ("✘", "red"), "cancelled": ("■", "yellow")}
SHOWN_CHARS = 70  # of the live text


class View(Protocol):
    """Shows events and streamed tokens until it is closed."""

    def event(self, run_id: str, event: Event) -> None: ...
    def token(self, token: Token) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class JsonView:
    """Each event as one JSON object a line."""

    def event(self, run_id: str, event: Event) -> None:
        """One line."""
        print(json.dumps({"run": run_id, "at_ms": event.at_ms, **event.to_json()}, ensure_ascii=False), flush=True)

    def token(self, token: Token) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """One line on stderr."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to undo."""


class PlainView(JsonView):
    """Each event as one plain line on stderr: only the answer goes to stdout."""

    def event(self, run_id: str, event: Event) -> None:
        """One line."""
        print(describe_event(run_id, event), file=sys.stderr, flush=True)


class TreeView:
    """A tree of agents with steps, tokens and time, redrawn in place."""

    def __init__(self) -> None:
        self._state = TreeState()
        self._notes: list[str] = []
        self._live = Live(console=Console(stderr=True), get_renderable=self.draw, refresh_per_second=8, transient=False)
        self._live.start()

    def event(self, run_id: str, event: Event) -> None:
        """Apply it to the tree."""
        self._state.add(run_id, event)

    def token(self, token: Token) -> None:
        """Append to the live text of a run."""
        line = self._state.lines.get(token.run_id)
        if line is not None:
            line.streamed = "" if token.kind == "retract" else (line.streamed + token.text)[-SHOWN_CHARS:]

    def note(self, text: str) -> None:
        """A line below the tree."""
        self._notes.append(text)

    def close(self) -> None:
        """Stop redrawing; the last tree stays on the screen."""
        self._live.stop()

    def draw(self) -> Any:
        """The tree as it is now."""
        lines = list(self._state.lines.values())
        if not lines:
            return Text("starting …")
        nodes: dict[str, Tree] = {}
        for line in sorted(lines, key=lambda x: [int(p) if p.isdigit() else 0 for p in x.run_id.split("/")]):
            label = self._label(line)
            parent = nodes.get(line.run_id.rpartition("/")[0])
            nodes[line.run_id] = parent.add(label) if parent is not None else Tree(label)
        root = next(iter(nodes.values()))
        done = sum(line.ended for line in lines)
        total = f"{done} steps · {self._state.tokens} tokens · {self._state.elapsed_s:.0f} s"
        root.add(Text("  ".join([total, *self._notes]), style="dim"))
        return root

    def _label(self, line: Line) -> Text:
        mark, colour = MARKS[line.status]
        text = Text(f"{mark} {line.agent}", style=colour)
        text.append(f"  {line.ended}/{line.planned}", style="dim")
        if line.tokens:
            together = f" ({line.batch} at once)" if line.batch > 1 else ""
            text.append(f"  {line.tokens} tok{together}", style="dim")
        if line.ended_ms:
            text.append(f"  {(line.ended_ms - line.started_ms) / 1000:.1f} s", style="dim")
        if line.retries:
            text.append(f"  {line.retries} retried", style="yellow")
        if line.status == "open" and line.streamed:
            text.append(f"  {' '.join(line.streamed.split())}", style="italic")
        elif line.task:
            text.append(f"  {line.task}", style="dim")
        return text


def make_view(*, as_json: bool) -> View:
    """JSON lines on request; else a tree on a terminal, and plain lines elsewhere."""
    if as_json:
        return JsonView()
    return TreeView() if sys.stderr.isatty() else PlainView()


def answer(value: Any, *, as_json: bool) -> None:
    """Print the run's value on stdout: text as it is, anything else as JSON."""
    if as_json:
        return  # the RunDone line has it
    print(value if isinstance(value, str) else json.dumps(to_json(value), indent=2, ensure_ascii=False), flush=True)
