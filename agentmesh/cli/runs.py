"""`agentmesh runs`: show and control runs; the commands need only the journal."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from rich.table import Table

from agentmesh.celery.event_loop import run_sync
from agentmesh.cli.run_view import describe_event, make_view
from agentmesh.config import Config, load_config
from agentmesh.engine.async_run import Approval, RunClient
from agentmesh.engine.run import Run
from agentmesh.errors import DefinitionError, RunError
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import RunHead
from agentmesh.runtime.bootstrap import open_journal
from agentmesh.runtime.valkey import EmbeddedValkey


def list_runs(limit: int, *, broker: str, as_json: bool, file: Path | None) -> int:
    """Print the newest runs."""
    access = JournalAccess.open(broker=broker, file=file)
    try:
        heads = run_sync(access.journal.runs(limit=limit))
        if as_json:
            for head in heads:
                print(json.dumps({name: getattr(head, name) for name in RunHead.__dataclass_fields__}))
            return 0
        table = Table("run", "state", "agent", "began", "turns", "tokens", "$", box=None, pad_edge=False)
        for head in heads:
            began = time.strftime("%m-%d %H:%M:%S", time.localtime(head.started_ms / 1000))
            state: str = head.status
            if state == "open" and (why := access.handle(head.id).waiting_for()):
                state = f"waiting: {_reason(why[0])}"
            cost = f"{head.cost_usd:.4f}" if head.cost_usd else ""
            table.add_row(head.id, state, f"{head.crew}.{head.agent}", began, str(head.turns), str(head.tokens), cost)
        Console().print(
            table if heads else f"no runs in {access.config.home if access.valkey else access.config.broker}"
        )
        return 0
    finally:
        access.close()


def show_run(run_id: str, *, broker: str, as_json: bool, file: Path | None) -> int:
    """Print the journal of a run and its sub-agents' runs, and what it waits for."""
    access = JournalAccess.open(broker=broker, file=file)
    try:
        run = access.run(run_id)
        for member, event in run.tree_events():
            line = json.dumps({"run": member, "at_ms": event.at_ms, **event.to_json()}, ensure_ascii=False)
            print(line if as_json else describe_event(member, event))
        for item in run.waiting_for():
            line = json.dumps({"waiting": item.why, "run": item.run_id, "n": item.n, "args": item.args})
            print(
                line
                if as_json
                else f"waiting: {_reason(item)} (run {item.run_id}, step {item.n}, {item.name} {dict(item.args)})"
            )
        return 0
    finally:
        access.close()


def tail_run(run_id: str, *, broker: str, as_json: bool, file: Path | None) -> int:
    """Follow a run to its end."""
    access = JournalAccess.open(broker=broker, file=file)
    view = make_view(as_json=as_json)
    try:
        for member, event in access.run(run_id).follow():
            view.event(member, event)
        return 0
    finally:
        view.close()
        access.close()


def decide(
    run_id: str, verb: Literal["approve", "deny", "cancel", "resolve"], *, n: int = 0, by: str = "", reason: str = "",
    action: str = "", value: str = "null", broker: str = "", file: Path | None = None,
) -> int:  # fmt: skip
    """Approve, deny, resolve or cancel: one decision to one run."""
    outcome = _outcome(action, value) if verb == "resolve" else None
    access = JournalAccess.open(broker=broker, file=file)
    try:
        run = access.run(run_id)
        item = Approval(run_id, n, "")
        if verb == "approve":
            run.approve(item, by=by)
        elif verb == "deny":
            run.deny(item, by=by, reason=reason)
        elif outcome is not None:
            run.resolve(item, outcome[0], value=outcome[1], by=by)
        else:
            run.cancel(by=by)
        print(f"{verb}: {run_id}{f' step {n}' if n else ''}")
        return 0
    finally:
        access.close()


def _outcome(action: str, value: str) -> tuple[Literal["done", "failed", "retry"], Any]:
    if action not in ("done", "failed", "retry"):
        raise DefinitionError(f"unknown outcome {action!r}", hint="use one of: done, failed, retry")
    try:
        return cast(Literal["done", "failed", "retry"], action), json.loads(value)
    except ValueError as e:
        raise DefinitionError(
            f"--value {value!r} is not JSON ({e})", hint="write text in double quotes: '\"text\"'"
        ) from None


def _reason(item: Approval) -> str:
    kind, _, rest = item.why.partition(":")
    where = f"{item.run_id} {item.n}"
    if kind == "quarantined":
        return f"a decision, because it crashed its worker repeatedly: agentmesh runs resolve {where} retry|failed|done"
    if kind == "in_doubt":
        return f"a decision, because it was interrupted and may have happened: agentmesh runs resolve {where} done|failed|retry"
    reasons = {"approve": "approval"}
    if kind == "version":
        crew, _, version = rest.partition(" ")
        return f"no worker of crew {crew!r}" + (f" version {version!r}" if version else "")
    if kind == "limit":
        return f"a higher limit of {rest}: agentmesh runs resume {item.run_id.partition('/')[0]} --limit {rest}=…"
    return reasons.get(kind, item.why)


# ---- Where a command finds its runs -------------------------------------------------------------


@dataclass(slots=True)
class JournalAccess:
    """Settings and an open journal, until `close`."""

    config: Config
    journal: Journal
    valkey: EmbeddedValkey | None

    @classmethod
    def open(cls, *, broker: str = "", model: str = "", file: Path | None = None) -> "JournalAccess":
        """Open the journal of the settings in force in this folder."""
        config = load_config(file=file, broker=broker or None, model=model or None)
        return cls(*open_journal(config))

    @property
    def client(self) -> RunClient:
        """The client of run handles; it needs no crew's code."""
        return RunClient(crew=None, journal=self.journal, run_sync=run_sync)

    def handle(self, run_id: str) -> Run[Any]:
        """A handle to a run; whether it exists shows when it is used."""
        return Run(self.client.get(run_id))

    def run(self, run_id: str) -> Run[Any]:
        """A handle to a run that exists.

        Raises:
            RunError: there is no such run.
        """
        if run_sync(self.journal.head(run_id)) is None:
            where = self.config.broker if self.valkey is None else str(self.config.home)
            raise RunError(
                f"there is no run {run_id!r} in {where}", hint="list the runs with `agentmesh runs ls`", run_id=run_id
            )
        return self.handle(run_id)

    def close(self) -> None:
        """Close the journal; the embedded Valkey may end."""
        run_sync(self.journal.close())
        if self.valkey is not None:
            self.valkey.leave()
