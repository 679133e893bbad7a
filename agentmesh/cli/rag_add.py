"""`agentmesh rag add` and `sync`: an ingest under supervised workers, shown as it goes."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from agentmesh.cli.rag_query import retriever
from agentmesh.cli.run import follow_run
from agentmesh.cli.run_view import JsonView, View
from agentmesh.config import load
from agentmesh.errors import DefinitionError
from agentmesh.journal.events import Event, RunDone, RunStarted, StepDone, StepPlanned
from agentmesh.journal.types import Token
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.rag.ingest import Added
from agentmesh.rag.ingestion.steps import nothing_to_do
from agentmesh.retriever import check_paths
from agentmesh.runtime.bootstrap import resolve_servers
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.process_exit import DONE, FAILED

CREW = "agentmesh.rag.ingest"
LINE_S = 1.0  # between two lines where the output is no terminal
MAX_SHOWN = 20  # failures that are printed
INGEST_STEPS = ("plan_ingest", "parse_pack", "embed_batch", "index_batch")


def add_documents(
    paths: list[str], *, store: Path | None, embed: str, glob: str, label: str, size: int, overlap: int, meta: list[str],
    broker: str, run_id: str, as_json: bool, file: Path | None, sync: bool = False, force: bool = False,
    queues: Sequence[str] = (),
) -> int:  # fmt: skip
    """Begin an ingest and see it to its end; 1 where a document could not be added. Where there is nothing to do, none begins.

    Args:
        queues: those that workers of this command serve; the others' steps wait for workers elsewhere.
    """
    crew = load_crew(CREW)
    crew.queues.broker_names(queues)
    retriever_ = retriever(store, embed, file)
    agent, request = retriever_.ingest(
        paths, glob=glob, label=label, size=size, overlap=overlap, metadata=_metadata(meta), sync=sync, force=force
    )
    check_paths(request)
    planned = None if run_id else nothing_to_do(agent.store, request, agent.how)
    if planned is not None:  # no run, and nobody to carry it
        added = Added(skipped=planned.skipped, failed=planned.failed)
        if as_json:
            JsonView().event("", RunDone(value=added.model_dump(mode="json"), at_ms=round(time.time() * 1000)))
        return print_added(added, as_json=as_json)
    config, valkey = resolve_servers(load(file=file, broker=broker or None))
    try:
        mesh = Mesh(crew, config=config, models=ModelRegistry())
        mesh.check()
        run = mesh.start(agent, request, id=run_id, stream=True, origin=CREW)
        view: View = JsonView() if as_json else BarProgress() if sys.stderr.isatty() else PlainProgress()
        return follow_run(run, mesh, CREW, config, as_json=as_json, view=view, say=print_added, queues=queues)
    finally:
        if valkey is not None:
            valkey.leave()


def print_added(added: Added, *, as_json: bool) -> int:
    """What came of it on the output, each failure on the error stream; the exit code."""
    if not as_json:
        parts = [f"{added.documents} documents added, {added.chunks} passages", f"{added.skipped} unchanged"]
        parts += [f"{added.removed} removed"] if added.removed else []
        parts += [f"{len(added.failed)} not added"] if added.failed else []
        print(" · ".join(parts), flush=True)
        for failure in added.failed[:MAX_SHOWN]:
            print(f"not added: {failure.source}: {failure.why}", file=sys.stderr)
        if len(added.failed) > MAX_SHOWN:
            print(f"… and {len(added.failed) - MAX_SHOWN} more; --json names all", file=sys.stderr)
    return FAILED if added.failed else DONE


def _metadata(meta: list[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for text in meta:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise DefinitionError(f"--meta {text!r} must be NAME=VALUE, such as year=2026")
        try:
            metadata[name] = json.loads(value)
        except ValueError:
            metadata[name] = value
    return metadata


# ---- where it stands -------------------------------------------------------------------------
@dataclass(slots=True)
class PackProgress:
    """One pack, or what is known of it."""

    bytes: int = 0
    chunks: int = 0
    embedded: int = 0
    parsed: bool = False


@dataclass(slots=True)
class IngestProgress:
    """How far an ingest is, made from its events and from what its steps say."""

    documents: int = 0
    bytes: int = 0
    skipped: int = 0
    done: int = 0
    chunks: int = 0
    failed: int = 0
    planned: bool = False
    steps: dict[tuple[str, int], str] = field(default_factory=dict)
    packs: dict[str, PackProgress] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def event(self, run_id: str, event: Event) -> None:
        """Take one more event in."""
        if isinstance(event, RunStarted) and event.agent == "Pack":
            self.packs[run_id] = PackProgress()
        elif isinstance(event, StepPlanned):
            self.steps[run_id, event.n] = event.name
        elif isinstance(event, StepDone) and isinstance(event.value, dict):
            self._step(self.steps.get((run_id, event.n), ""), run_id, event.value)

    def _step(self, name: str, run_id: str, value: dict[str, Any]) -> None:
        if name in INGEST_STEPS:
            self.failed += len(value.get("failed", ()))
        if name == "plan_ingest":
            self.planned, self.began = True, time.monotonic()
            self.documents, self.bytes, self.skipped = value["documents"], value["bytes"], value["skipped"]
        elif name == "parse_pack":
            pack = self.packs[run_id]
            pack.parsed, pack.bytes, pack.chunks = True, value["bytes"], sum(b["chunks"] for b in value["batches"])
        elif name == "index_batch":
            self.done += value["documents"]
            self.chunks += value["chunks"]

    def token(self, token: Token) -> None:
        """What an embedding step says of itself: `200/600 chunks`."""
        done = token.text.partition("/")[0]
        if token.kind == "progress" and token.run_id in self.packs and done.isdigit():
            self.packs[token.run_id].embedded = int(done)

    @property
    def share(self) -> float:
        """Of the work that is done: by bytes, within a pack by chunks."""
        if not self.bytes:
            return 1.0 if self.planned else 0.0
        through = sum(
            p.bytes * (min(1.0, p.embedded / p.chunks) if p.chunks else 1) for p in self.packs.values() if p.parsed
        )
        return min(1.0, through / self.bytes)

    def __str__(self) -> str:
        if not self.planned:
            return "listing …"
        spent = max(1e-3, time.monotonic() - self.began)
        embedded = max(self.chunks, sum(p.embedded for p in self.packs.values()))
        parts = [f"{self.done}/{self.documents} documents", f"{embedded} passages", f"{embedded / spent:.0f}/s"]
        if 0.01 < self.share < 1:
            parts.append(f"{spent * (1 - self.share) / self.share:.0f} s left")
        parts += [f"{self.skipped} unchanged"] if self.skipped else []
        parts += [f"{self.failed} failed"] if self.failed else []
        return " · ".join(parts)


class PlainProgress:
    """A plain line a second, on the error stream."""

    def __init__(self) -> None:
        self.course, self._said, self._last = IngestProgress(), time.monotonic(), ""

    def event(self, run_id: str, event: Event) -> None:
        """Take it in."""
        self.course.event(run_id, event)
        self._say()

    def token(self, token: Token) -> None:
        """Take it in."""
        self.course.token(token)
        self._say()

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """The last line."""
        self._say(last=True)

    def _say(self, *, last: bool = False) -> None:
        line = str(self.course)
        if (last or time.monotonic() - self._said >= LINE_S) and line != self._last:
            self._said, self._last = time.monotonic(), line
            print(line, file=sys.stderr, flush=True)


class BarProgress(PlainProgress):
    """A bar, redrawn in place."""

    def __init__(self) -> None:
        super().__init__()
        columns = BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task: TaskID = self._bar.add_task("listing …", total=1.0)
        self._bar.start()

    def _say(self, *, last: bool = False) -> None:
        self._bar.update(self._task, completed=self.course.share, description=str(self.course))

    def close(self) -> None:
        """Leave the bar standing."""
        self._say(last=True)
        self._bar.stop()
