"""`agentmesh rag add` and `sync`: an ingest by supervised workers, with its progress on the terminal."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from agentmesh.cli.rag_query import open_retriever
from agentmesh.cli.run import follow_run
from agentmesh.cli.run_view import JsonView, View
from agentmesh.config import load_config
from agentmesh.errors import DefinitionError
from agentmesh.journal.events import Event, RunDone, RunStarted, StepDone, StepPlanned
from agentmesh.journal.types import Token
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.rag.ingest import Added
from agentmesh.rag.ingestion.options import check_paths
from agentmesh.rag.ingestion.steps import nothing_to_do
from agentmesh.runtime.bootstrap import resolve_servers
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.process_exit import DONE, FAILED

CREW = "agentmesh.rag.ingest"
PROGRESS_LINE_S = 1.0  # between two lines of progress where stderr is not a terminal
MAX_SHOWN_FAILURES = 20
INGEST_STEPS = ("plan_ingest", "parse_pack", "embed_batch", "index_batch")


def add_documents(
    paths: list[str], *, store: str | None, embed: str, glob: str, label: str, size: int, overlap: int, meta: list[str],
    broker: str, run_id: str, as_json: bool, file: Path | None, sync: bool = False, force: bool = False,
    queues: Sequence[str] = (),
) -> int:  # fmt: skip
    """Run an ingest and follow it; returns 1 where a document could not be added. When nothing is to be done, no run begins.

    Args:
        queues: those that this command's workers serve; the steps of the others wait for other workers.
    """
    crew = load_crew(CREW)
    crew.queues.broker_names(queues)
    retriever = open_retriever(store, embed, file)
    if retriever.other_store is not None:
        return print_added(retriever.add(
            paths, glob=glob, label=label, size=size, overlap=overlap, metadata=_parse_metadata(meta), sync=sync, force=force,
        ), as_json=as_json)  # fmt: skip
    agent, request = retriever.ingest(
        paths,
        glob=glob,
        label=label,
        size=size,
        overlap=overlap,
        metadata=_parse_metadata(meta),
        sync=sync,
        force=force,
    )
    check_paths(request)
    planned = None if run_id else nothing_to_do(agent.store, request, agent.how)
    if planned is not None:  # no run and no worker
        added = Added(skipped=planned.skipped, failed=planned.failed)
        if as_json:
            JsonView().event("", RunDone(value=added.model_dump(mode="json"), at_ms=round(time.time() * 1000)))
        return print_added(added, as_json=as_json)
    config, valkey = resolve_servers(load_config(file=file, broker=broker or None))
    try:
        mesh = Mesh(crew, config=config, models=ModelRegistry())
        mesh.check()
        run = mesh.start(agent, request, run_id=run_id, stream=True, origin=CREW)
        view: View = JsonView() if as_json else BarProgress() if sys.stderr.isatty() else PlainProgress()
        return follow_run(run, mesh, CREW, config, as_json=as_json, view=view, print_value=print_added, queues=queues)
    finally:
        if valkey is not None:
            valkey.leave()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' if n != 1 else ''}"


def print_added(added: Added, *, as_json: bool) -> int:
    """Print the result to stdout and the failures to stderr; returns the exit code."""
    if not as_json:
        documents, passages = _count(added.documents, "document"), _count(added.chunks, "passage")
        parts = [f"{documents} added, {passages}", f"{added.skipped} unchanged"]
        parts += [f"{added.removed} removed"] if added.removed else []
        parts += [f"{len(added.failed)} not added"] if added.failed else []
        print(" · ".join(parts), flush=True)
        for failure in added.failed[:MAX_SHOWN_FAILURES]:
            print(f"not added: {failure.source}: {failure.why}", file=sys.stderr)
        if len(added.failed) > MAX_SHOWN_FAILURES:
            print(f"… and {len(added.failed) - MAX_SHOWN_FAILURES} more; --json prints all of them", file=sys.stderr)
    return FAILED if added.failed else DONE


def _parse_metadata(meta: list[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for text in meta:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise DefinitionError(f"--meta {text!r} is not NAME=VALUE", hint="write one such as year=2026")
        try:
            metadata[name] = json.loads(value)
        except ValueError:
            metadata[name] = value
    return metadata


# ---- progress --------------------------------------------------------------------------------
@dataclass(slots=True)
class PackProgress:
    """How far one pack is."""

    bytes: int = 0
    chunks: int = 0
    embedded: int = 0
    parsed: bool = False


@dataclass(slots=True)
class IngestProgress:
    """How far an ingest is, computed from its events and from the progress that its steps report."""

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
        """Count an event."""
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
        """Count the progress of an embedding step: `200/600 chunks`."""
        embedded = token.text.partition("/")[0]
        if token.kind == "progress" and token.run_id in self.packs and embedded.isdigit():
            self.packs[token.run_id].embedded = int(embedded)

    @property
    def share(self) -> float:
        """The share of the work that is done, 0 to 1: by bytes, within a pack by chunks."""
        if not self.bytes:
            return 1.0 if self.planned else 0.0
        bytes_done = sum(
            p.bytes * (min(1.0, p.embedded / p.chunks) if p.chunks else 1) for p in self.packs.values() if p.parsed
        )
        return min(1.0, bytes_done / self.bytes)

    def __str__(self) -> str:
        if not self.planned:
            return "listing …"
        elapsed_s = max(1e-3, time.monotonic() - self.began)
        embedded = max(self.chunks, sum(p.embedded for p in self.packs.values()))
        parts = [f"{self.done}/{self.documents} documents", f"{embedded} passages", f"{embedded / elapsed_s:.0f}/s"]
        if 0.01 < self.share < 1:
            parts.append(f"{elapsed_s * (1 - self.share) / self.share:.0f} s left")
        parts += [f"{self.skipped} unchanged"] if self.skipped else []
        parts += [f"{self.failed} failed"] if self.failed else []
        return " · ".join(parts)


class PlainProgress:
    """A line of progress each second, on stderr."""

    def __init__(self) -> None:
        self.progress, self._printed_at, self._last_line = IngestProgress(), time.monotonic(), ""

    def event(self, run_id: str, event: Event) -> None:
        """Count an event and show the progress."""
        self.progress.event(run_id, event)
        self._show()

    def token(self, token: Token) -> None:
        """Count a step's progress and show it."""
        self.progress.token(token)
        self._show()

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the final progress."""
        self._show(last=True)

    def _show(self, *, last: bool = False) -> None:
        line = str(self.progress)
        if (last or time.monotonic() - self._printed_at >= PROGRESS_LINE_S) and line != self._last_line:
            self._printed_at, self._last_line = time.monotonic(), line
            print(line, file=sys.stderr, flush=True)


class BarProgress(PlainProgress):
    """A progress bar on stderr, redrawn in place."""

    def __init__(self) -> None:
        super().__init__()
        columns = BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task: TaskID = self._bar.add_task("listing …", total=1.0)
        self._bar.start()

    def _show(self, *, last: bool = False) -> None:
        self._bar.update(self._task, completed=self.progress.share, description=str(self.progress))

    def close(self) -> None:
        """Show the final progress and leave the bar on the screen."""
        self._show(last=True)
        self._bar.stop()
