"""Between the engine's words and the protocol's JSON: one adapter for every journal; knows no store."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from agentmesh.errors import JournalVersion
from agentmesh.event import (
    ENDS,
    Approved,
    Denied,
    Event,
    LimitRaised,
    RunCancelled,
    RunStarted,
    StepDone,
    StepFailed,
    StepInDoubt,
    StepPlanned,
    StepResolved,
    StepRetried,
    StepRevived,
    event_from_json,
)
from agentmesh.journal import Swept
from agentmesh.ports import Accepted, Carried, Claimed, Next, Plan, Refused, RunSpec
from agentmesh.schema import digest, dumps, loads

TTL_MS = 10_000
RETAIN_MS = 30 * 24 * 3600 * 1000
Told = Approved | Denied | RunCancelled | LimitRaised | StepResolved | StepRevived
Reply = tuple[dict[str, Any], list[str]]


def text_of(event: Event) -> str:
    """An event as the journal's line, without its time."""
    return dumps(event.to_json())


def event_of(line: str) -> Event:
    """The event of a journal's line `AT_MS JSON`."""
    at, _, text = line.partition(" ")
    try:
        return event_from_json(loads(text), int(at))
    except KeyError as e:
        raise JournalVersion(
            f"the journal holds an event {e.args[0]!r} that this agentmesh does not know: upgrade it"
        ) from None


def run_started(spec: RunSpec) -> RunStarted:
    """A run's first fact."""
    return RunStarted(
        crew=spec.crew, version=spec.version, agent=spec.agent, task=spec.task, fields=spec.fields,
        history=list(spec.history), parent=spec.parent, parent_n=spec.parent_n, limits=spec.limits,
        origin=spec.origin, stream=spec.stream, canvas=spec.canvas, trace=spec.trace,
    )  # fmt: skip


def head_of(spec: RunSpec) -> dict[str, Any]:
    """What the store must know of a run to work on it."""
    head: dict[str, Any] = {"crew": spec.crew, "version": spec.version, "agent": spec.agent}
    if spec.wire:
        head["wire"] = spec.wire.packed()
    if spec.finish:
        head["finish"] = spec.finish.packed()
    if spec.parent:
        head |= {"parent": spec.parent, "n": spec.parent_n}
    else:
        head["on_limit"] = spec.limits.get("on_limit", "hold")
        named = ("turns", "tokens", "cost_usd", "seconds")
        head |= {f"lim_{k}": spec.limits[k] for k in named if spec.limits.get(k) is not None}
    return head


def spec_digest(spec: RunSpec) -> str:
    """What must be the same when a run is begun again under its id."""
    return digest(spec.crew, spec.agent, spec.task, dict(spec.fields))


def next_of(nxt: Next) -> dict[str, Any]:
    """`next` as the scripts read it; absent means absent, never null."""
    out: dict[str, Any] = {}
    if nxt.plans:
        out["plans"] = [plan_of(p) for p in nxt.plans]
    if g := nxt.gather:
        out["gather"] = {"first": g.first, "last": g.last, "need": g.need, "everyone": int(g.everyone),
                         "deadline": g.deadline_in_ms, "window": g.window}  # fmt: skip
    if nxt.end:
        status = {"RunDone": "done", "RunFailed": "failed"}.get(type(nxt.end).__name__, "cancelled")
        out["end"] = {"status": status, "event": text_of(nxt.end)}
        if nxt.up:
            out["end"] |= {"up": text_of(nxt.up), "up_ok": int(isinstance(nxt.up, StepDone))}
    return out


def plan_of(p: Plan) -> dict[str, Any]:
    """One step to plan."""
    planned = p.event
    assert isinstance(planned, StepPlanned)
    out: dict[str, Any] = {"n": planned.n, "kind": planned.kind, "state": p.state, "event": text_of(planned)}
    if p.wire:
        out["wire"] = p.wire.packed()
    if p.state == "due":
        out["due"] = p.due_in_ms
    if p.state == "held":
        out["held"] = p.held
    if p.child:
        out["child"] = {"spec": head_of(p.child), "started": text_of(run_started(p.child))}
    if p.end:
        out["end"] = text_of(p.end)
    if p.once:
        out |= {"once": 1, "digest": planned.digest}
    if p.reconcile:
        out["rec"] = 1
    return out


def carried_of(c: Carried) -> dict[str, Any]:
    """A run's share of a retry."""
    events = [{"at": e.at_ms, "event": text_of(e)} for e in c.events]
    return {
        "from": c.old,
        "run": c.new,
        "events": events,
        "kept": list(c.kept),
        "cut": [[n, d] for n, d in c.cut.items()],
    }


class VerbJournal(ABC):
    """A Journal whose verbs are one atomic call each: `_call(verb, arguments)`.

    Args:
        ttl_ms: how long a lease lasts without renewal.
        retain_ms: how long an ended run stays.
    """

    def __init__(self, *, ttl_ms: int = TTL_MS, retain_ms: int = RETAIN_MS) -> None:
        self.ttl_ms, self.retain_ms = ttl_ms, retain_ms

    @property
    def epoch(self) -> int:
        """See journal.Journal."""
        return 0

    @abstractmethod
    async def _call(self, verb: str, args: dict[str, Any]) -> Reply:
        """Do the verb; its header and its texts."""

    async def begin(self, spec: RunSpec, next: Next, carried: Sequence[Carried] = ()) -> Accepted | Refused:
        """See ports.Journal."""
        started = carried[0].events[0] if carried else run_started(spec)
        args: dict[str, Any] = {"run": spec.id, "spec": head_of(spec), "started": text_of(started),
                "digest": spec_digest(spec), "next": next_of(next)}  # fmt: skip
        if carried:
            args |= {"carried": [carried_of(c) for c in carried]}
        return _accepted(await self._call("begin", args))

    async def claim(
        self, unit: str, *, worker: str, token: str, version: int, crew: str, crew_version: str,
        ask: bool = False, rate: tuple[int, int] | None = None, apart: bool = False,
    ) -> Claimed | Refused:  # fmt: skip
        """See ports.Journal."""
        args: dict[str, Any] = {"unit": unit, "worker": worker, "token": token, "version": version, "crew": crew,
                                "crew_version": crew_version, "ttl": self.ttl_ms}  # fmt: skip
        if ask:
            args["ask"] = 1
        if rate:
            args |= {"rate_ms": rate[0], "burst": rate[1]}
        if apart:
            args["apart"] = 1
        head, lines = await self._call("claim", args)
        if "no" in head:
            return Refused(head["no"], head.get("detail", ""))
        events = [event_of(line) for line in lines]
        return Claimed(head["fence"], events, head["version"], head["attempt"], bool(head["doubt"]), head["limit"])

    async def renew(self, worker: str, leases: Sequence[tuple[str, int]]) -> Sequence[str]:
        """See ports.Journal."""
        args = {"worker": worker, "leases": [list(lease) for lease in leases], "ttl": self.ttl_ms}
        return (await self._call("renew", args))[1]

    async def release(self, worker: str, *, crashed: bool, queues: Sequence[str] = (), below: bool = False) -> int:
        """See ports.Journal."""
        args = {"worker": worker, "crashed": int(crashed), "queues": list(queues), "below": int(below)}
        return int((await self._call("release", args))[0]["count"])

    async def commit(self, unit: str, *, fence: int, event: Event, version: int = 0, next: Next | None = None,
                     charge: dict[str, float] | None = None) -> Accepted | Refused:  # fmt: skip
        """See ports.Journal."""
        how = {StepDone: "done", StepFailed: "failed", StepRetried: "retried", StepInDoubt: "doubt"}[type(event)]
        args: dict[str, Any] = {"unit": unit, "fence": fence, "event": text_of(event), "how": how, "version": version}
        if charge:
            args["usage"] = charge
        if isinstance(event, StepRetried):
            args["delay"] = event.after_ms
        if next is not None:
            args["next"] = next_of(next)
        return _accepted(await self._call("commit", args))

    async def plan(self, run_id: str, *, fence: int, version: int, next: Next) -> Accepted | Refused:
        """See ports.Journal."""
        args = {"run": run_id, "fence": fence, "version": version, "next": next_of(next)}
        return _accepted(await self._call("plan", args))

    async def hold(self, unit: str, *, fence: int, why: str) -> Accepted | Refused:
        """See ports.Journal."""
        return _accepted(await self._call("hold", {"unit": unit, "fence": fence, "why": why}))

    async def tell(self, run_id: str, event: Told) -> Accepted | Refused:
        """See ports.Journal."""
        args: dict[str, Any] = {"run": run_id, "kind": type(event).__name__, "event": text_of(event)}
        args["n"] = getattr(event, "n", 0)
        if isinstance(event, StepResolved):
            args["action"] = event.action
        if isinstance(event, LimitRaised):
            args["limits"] = dict(event.limits)
        if isinstance(event, RunCancelled) and "/" in run_id:
            error = {"type": "DelegateFailed", "message": f"run {run_id} was cancelled", "child": run_id}
            args["up"] = text_of(StepFailed(n=int(run_id.rpartition("/")[2]), error=error))
        return _accepted(await self._call("tell", args))

    async def sweep(self, worker: str, *, empty: Sequence[str] = (), look: bool = False, limit: int = 200) -> Swept:
        """See ports.Journal."""
        args = {"worker": worker, "empty": list(empty), "limit": limit, "ttl": self.ttl_ms, "retain": self.retain_ms}
        said = (await self._call("sweep", args | ({"look": 1} if look else {}) | await self._boot()))[0]
        return Swept(int(said["count"]), int(said["rest"]), bool(said["ok"]))

    async def told(self, run_id: str) -> None:
        """See ports.Journal."""
        await self._call("told", {"run": run_id})

    async def _boot(self) -> dict[str, str]:
        """`{"boot": ID}` of the store's process, where it can die alone."""
        return {}


def _accepted(reply: Reply) -> Accepted | Refused:
    head, lines = reply
    if "no" in head:
        events = [event_of(line) for line in lines]
        return Refused(head["no"], head.get("detail", ""), events, head.get("version", 0))
    return Accepted(head.get("version", 0), bool(head.get("conflict")), bool(head.get("again")))


def ended(event: Event | None) -> bool:
    """Whether a run's last fact says that it is over."""
    return isinstance(event, ENDS)
