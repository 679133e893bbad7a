"""From the engine's values to the protocol's JSON and back, the same for every journal. Knows no store."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from sys import getsizeof
from typing import Any

from agentmesh.errors import JournalVersion
from agentmesh.journal.events import (
    Approved,
    Denied,
    Event,
    LimitRaised,
    RunCancelled,
    RunStarted,
    StepDone,
    StepFailed,
    StepInDoubt,
    StepResolved,
    StepRetried,
    StepRevived,
    event_from_json,
)
from agentmesh.journal.journal import SweepResult
from agentmesh.journal.run_spec import RunSpec
from agentmesh.journal.types import Accepted, Claimed, NewRun, NextSteps, Refused, RetryImport, StepPlan
from agentmesh.schema import digest, dumps, loads

TTL_MS = 10_000
RETAIN_MS = 30 * 24 * 3600 * 1000
Signal = Approved | Denied | RunCancelled | LimitRaised | StepResolved | StepRevived
Reply = tuple[dict[str, Any], list[str]]


def encode_event(event: Event) -> str:
    """An event as the journal's line, without its time."""
    text = dumps(event.to_json())
    object.__setattr__(event, "line_bytes", getsizeof(text))  # a measure of the event, no part of the fact
    return text


def decode_event(line: str) -> Event:
    """The event of a journal's line `AT_MS JSON`."""
    at, _, text = line.partition(" ")
    try:
        return event_from_json(loads(text), int(at), getsizeof(line))
    except KeyError as e:
        raise JournalVersion(
            f"the journal holds an event {e.args[0]!r} that this version of agentmesh does not know",
            hint="upgrade agentmesh",
        ) from None


def head_of(new: NewRun) -> dict[str, Any]:
    """What the store must know of a run to work on it."""
    spec = new.spec
    head: dict[str, Any] = {"crew": spec.crew, "version": spec.version, "agent": spec.agent}
    if new.wire:
        head["wire"] = new.wire.packed()
    if new.finish:
        head["finish"] = new.finish.packed()
    if spec.parent:
        head |= {"parent": spec.parent, "n": spec.parent_n}
    else:
        head["on_limit"] = spec.limits.get("on_limit", "hold")
        limit_names = ("turns", "tokens", "cost_usd", "seconds")
        head |= {f"lim_{k}": spec.limits[k] for k in limit_names if spec.limits.get(k) is not None}
    return head


def spec_digest(spec: RunSpec) -> str:
    """What must be the same when a run is begun again under its id."""
    return digest(spec.crew, spec.agent, spec.task, dict(spec.fields))


def encode_next(nxt: NextSteps) -> dict[str, Any]:
    """`next` as the scripts read it; absent means absent, never null."""
    out: dict[str, Any] = {}
    if nxt.plans:
        out["plans"] = [encode_plan(p) for p in nxt.plans]
    if g := nxt.gather:
        out["gather"] = {"first": g.first, "last": g.last, "need": g.need, "everyone": int(g.everyone),
                         "deadline": g.deadline_in_ms, "window": g.window}  # fmt: skip
    if nxt.end:
        status = {"RunDone": "done", "RunFailed": "failed"}.get(type(nxt.end).__name__, "cancelled")
        out["end"] = {"status": status, "event": encode_event(nxt.end)}
        if nxt.up:
            out["end"] |= {"up": encode_event(nxt.up), "up_ok": int(isinstance(nxt.up, StepDone))}
    return out


def encode_plan(p: StepPlan) -> dict[str, Any]:
    """One step to plan."""
    planned = p.event
    out: dict[str, Any] = {"n": planned.n, "state": p.state, "event": encode_event(planned)}
    if planned.lane != "queued":
        out |= {"lane": planned.lane, "kind": planned.kind}  # workers of earlier versions know the lane by the kind
    if p.wire:
        out["wire"] = p.wire.packed()
    if p.state == "due":
        out["due"] = p.due_in_ms
    if p.state == "held":
        out["held"] = p.held
    if p.child:
        out["child"] = {"spec": head_of(p.child), "started": encode_event(RunStarted.of(p.child.spec))}
    if p.end:
        out["end"] = encode_event(p.end)
    if p.limited:
        out["limited"] = 1
    if p.once:
        out |= {"once": 1, "digest": planned.digest}
    if p.reconcile:
        out["rec"] = 1
    return out


def encode_import(c: RetryImport) -> dict[str, Any]:
    """What one run of a tree begins with in a retry."""
    events = [{"at": e.at_ms, "event": encode_event(e)} for e in c.events]
    return {
        "from": c.old,
        "run": c.new,
        "events": events,
        "kept": list(c.retained),
        "cut": [[n, d] for n, d in c.interrupted.items()],
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
        """See Journal."""
        return 0

    @abstractmethod
    async def _execute(self, verb: str, args: dict[str, Any]) -> Reply:
        """Execute the verb; answers its header and its texts."""

    async def begin(self, new: NewRun, next: NextSteps, carried: Sequence[RetryImport] = ()) -> Accepted | Refused:
        """See Journal."""
        args: dict[str, Any] = {"run": new.run_id, "spec": head_of(new), "started": encode_event(RunStarted.of(new.spec)),
                "digest": spec_digest(new.spec), "next": encode_next(next)}  # fmt: skip
        if carried:
            args |= {"carried": [encode_import(c) for c in carried]}
        return _accepted(await self._execute("begin", args))

    async def claim(
        self, unit: str, *, worker: str, token: str, version: int, crew: str, crew_version: str,
        rate: tuple[int, int] | None = None, apart: bool = False,
    ) -> Claimed | Refused:  # fmt: skip
        """See Journal."""
        args: dict[str, Any] = {"unit": unit, "worker": worker, "token": token, "version": version, "crew": crew,
                                "crew_version": crew_version, "ttl": self.ttl_ms}  # fmt: skip
        if rate:
            args |= {"rate_ms": rate[0], "burst": rate[1]}
        if apart:
            args["apart"] = 1
        head, lines = await self._execute("claim", args)
        if "no" in head:
            return Refused(head["no"], head.get("detail", ""))
        events = [decode_event(line) for line in lines]
        return Claimed(head["fence"], events, head["version"], head["attempt"], bool(head["doubt"]), head["limit"])

    async def renew(self, worker: str, leases: Sequence[tuple[str, int]]) -> Sequence[str]:
        """See Journal."""
        args = {"worker": worker, "leases": [list(lease) for lease in leases], "ttl": self.ttl_ms}
        return (await self._execute("renew", args))[1]

    async def release(self, worker: str, *, crashed: bool, queues: Sequence[str] = (), below: bool = False) -> int:
        """See Journal."""
        args = {"worker": worker, "crashed": int(crashed), "queues": list(queues), "below": int(below)}
        return int((await self._execute("release", args))[0]["count"])

    async def commit(self, unit: str, *, fence: int, event: Event, version: int = 0, next: NextSteps | None = None,
                     charge: dict[str, float] | None = None) -> Accepted | Refused:  # fmt: skip
        """See Journal."""
        how = {StepDone: "done", StepFailed: "failed", StepRetried: "retried", StepInDoubt: "doubt"}[type(event)]
        args: dict[str, Any] = {
            "unit": unit,
            "fence": fence,
            "event": encode_event(event),
            "how": how,
            "version": version,
        }
        if charge:
            args["usage"] = charge
        if isinstance(event, StepRetried):
            args["delay"] = event.after_ms
        if next is not None:
            args["next"] = encode_next(next)
        return _accepted(await self._execute("commit", args))

    async def plan(self, run_id: str, *, fence: int, version: int, next: NextSteps) -> Accepted | Refused:
        """See Journal."""
        args = {"run": run_id, "fence": fence, "version": version, "next": encode_next(next)}
        return _accepted(await self._execute("plan", args))

    async def hold(self, unit: str, *, fence: int, why: str) -> Accepted | Refused:
        """See Journal."""
        return _accepted(await self._execute("hold", {"unit": unit, "fence": fence, "why": why}))

    async def signal(self, run_id: str, event: Signal) -> Accepted | Refused:
        """See Journal."""
        args: dict[str, Any] = {"run": run_id, "kind": type(event).__name__, "event": encode_event(event)}
        args["n"] = getattr(event, "n", 0)
        if isinstance(event, StepResolved):
            args["action"] = event.action
        if isinstance(event, LimitRaised):
            args["limits"] = dict(event.limits)
        if isinstance(event, RunCancelled) and "/" in run_id:
            error = {"type": "DelegateFailed", "message": f"run {run_id} was cancelled", "child": run_id}
            args["up"] = encode_event(StepFailed(n=int(run_id.rpartition("/")[2]), error=error))
        return _accepted(await self._execute("signal", args))

    async def sweep(
        self, worker: str, *, empty: Sequence[str] = (), look: bool = False, limit: int = 200
    ) -> SweepResult:
        """See Journal."""
        args = {"worker": worker, "empty": list(empty), "limit": limit, "ttl": self.ttl_ms, "retain": self.retain_ms}
        header = (await self._execute("sweep", args | ({"look": 1} if look else {}) | await self._boot()))[0]
        return SweepResult(int(header["count"]), int(header["rest"]), bool(header["ok"]))

    async def notified(self, run_id: str) -> None:
        """See Journal."""
        await self._execute("notified", {"run": run_id})

    async def _boot(self) -> dict[str, str]:
        """`{"boot": ID}` of the store's process, where the store is a process of its own."""
        return {}


def _accepted(reply: Reply) -> Accepted | Refused:
    head, lines = reply
    if "no" in head:
        events = [decode_event(line) for line in lines]
        return Refused(head["no"], head.get("detail", ""), events, head.get("version", 0))
    return Accepted(head.get("version", 0), bool(head.get("conflict")), bool(head.get("again")))


# ---- Large values live beside the journal -------------------------------------------------------

LARGE_BYTES = 64 * 1024
LARGE_KEYS = ("event", "started", "end", "up")
# Matches the whole line, and no event has a field `blob`: a user's value `{"blob": …}` is not taken for a stub.
STUB = re.compile(r'\d+ \{"e":"\w+","blob":"([0-9a-f]{64})"(?:,"n":\d+)?\}')
LONGEST_STUB = 200


def extract_large(args: Any) -> Iterator[tuple[str, str]]:
    """Replace each large event text in a verb's arguments, in place; gives (fingerprint, text) of those taken out."""
    if isinstance(args, list):
        for item in args:
            if isinstance(item, dict):
                yield from extract_large(item)
    elif isinstance(args, dict):
        for key, value in args.items():
            if isinstance(value, dict | list):
                yield from extract_large(value)
            elif key in LARGE_KEYS and isinstance(value, str) and len(value) * 4 > LARGE_BYTES:
                raw = value.encode()
                if len(raw) > LARGE_BYTES:
                    fingerprint = hashlib.sha256(raw).hexdigest()
                    args[key] = _make_stub(value, fingerprint)
                    yield fingerprint, value


def _make_stub(text: str, fingerprint: str) -> str:
    """What replaces a large event: its kind, its step's number and the fingerprint of its text."""
    event = json.loads(text)
    stub = {"e": event["e"], "blob": fingerprint, **({"n": event["n"]} if "n" in event else {})}
    return json.dumps(stub, separators=(",", ":"))


def fingerprint_of(line: str) -> str:
    """The fingerprint of the blob that a journal's line stands for, or ""."""
    match = STUB.fullmatch(line) if len(line) <= LONGEST_STUB else None
    return match[1] if match else ""


def restore(line: str, text: str) -> str:
    """The line with its whole event in place of the stub."""
    return f"{line.partition(' ')[0]} {text}"
