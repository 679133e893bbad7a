"""What a person sees of a run while it goes: a live tree on a terminal, plain lines elsewhere, JSON for programs."""

import json
import sys
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from agentmesh.cli.watching import Line, Picture, sentence
from agentmesh.event import Event
from agentmesh.ports import Token
from agentmesh.schema import to_json

MARKS = {"open": ("●", "cyan"), "done": ("✔", "green"), "failed": ("✘", "red"), "cancelled": ("■", "yellow")}
SHOWN_TAIL = 70


class View(Protocol):
    """Shows events and live text until it is closed."""

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
        """To the error stream."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to undo."""


class PlainView(JsonView):
    """Each event as one plain line, on the error stream: the answer alone goes to the output."""

    def event(self, run_id: str, event: Event) -> None:
        """One line."""
        print(sentence(run_id, event), file=sys.stderr, flush=True)


class TreeView:
    """A tree of agents with steps, tokens and time, redrawn in place."""

    def __init__(self) -> None:
        self._picture = Picture()
        self._notes: list[str] = []
        self._live = Live(console=Console(stderr=True), get_renderable=self.draw, refresh_per_second=8, transient=False)
        self._live.start()

    def event(self, run_id: str, event: Event) -> None:
        """Take it into the picture."""
        self._picture.add(run_id, event)

    def token(self, token: Token) -> None:
        """The last words a run said."""
        line = self._picture.lines.get(token.run_id)
        if line is not None:
            line.said = "" if token.kind == "retract" else (line.said + token.text)[-SHOWN_TAIL:]

    def note(self, text: str) -> None:
        """A line below the tree."""
        self._notes.append(text)

    def close(self) -> None:
        """Leave the last picture standing."""
        self._live.stop()

    def draw(self) -> Any:
        """The picture as it is now."""
        lines = list(self._picture.lines.values())
        if not lines:
            return Text("starting …")
        nodes: dict[str, Tree] = {}
        for line in sorted(lines, key=lambda x: [int(p) if p.isdigit() else 0 for p in x.run_id.split("/")]):
            label = self._label(line)
            parent = nodes.get(line.run_id.rpartition("/")[0])
            nodes[line.run_id] = parent.add(label) if parent is not None else Tree(label)
        root = next(iter(nodes.values()))
        done = sum(line.ended for line in lines)
        total = f"{done} steps · {self._picture.tokens} tokens · {self._picture.elapsed_s:.0f} s"
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
        if line.status == "open" and line.said:
            text.append(f"  {' '.join(line.said.split())}", style="italic")
        elif line.task:
            text.append(f"  {line.task}", style="dim")
        return text


def make_view(*, as_json: bool) -> View:
    """The view that fits where the output goes."""
    if as_json:
        return JsonView()
    return TreeView() if sys.stderr.isatty() else PlainView()


def answer(value: Any, *, as_json: bool) -> None:
    """The run's value on the output: text as it is, anything else as JSON."""
    if as_json:
        return  # RunDone said it
    print(value if isinstance(value, str) else json.dumps(to_json(value), indent=2, ensure_ascii=False), flush=True)
