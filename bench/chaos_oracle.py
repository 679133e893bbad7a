"""What stands outside the system and counts: what the LLM server was asked, what tools wrote, what was held at each fault."""

import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from agentmesh.journal.events import StepDone, StepFailed
from agentmesh.mesh import Mesh
from agentmesh.testing import FakeOpenAI, says, uses


def answer(body: dict[str, Any]) -> Any:
    """The planner repeats the task; a sub-agent looks its word up and says what it found; the writer joins."""
    last = body["messages"][-1]
    text = str(last["content"])
    if last["role"] == "tool":
        return says(f"<{text}>")
    if body.get("tools"):
        return uses("look_up", word=text)
    return says(f"page: {text}" if "|" in text else f"{text}.plan")


def expected(task: str) -> str:
    """The only right result."""
    return "page: " + " | ".join(f"<meaning of {task}.plan-{i}>" for i in range(4))


@dataclass
class Tally:
    """The figures of one row of the table."""

    runs: int = 0
    lost: int = 0
    hung: int = 0
    double: int = 0
    llm_repeated: int = 0
    llm_excused: int = 0
    tools_repeated: int = 0
    tools_excused: int = 0
    resume_s: dict[str, list[float]] = field(default_factory=dict)
    wall_s: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Struck:
    """A unit of work that a process held when a fault struck it."""

    fault: str
    at_ms: int
    unit: str
    kind: str


class Oracle:
    """Notes what each victim held, and counts at the end."""

    def __init__(self, url: str, server: FakeOpenAI, log: Path) -> None:
        self._redis = redis.Redis.from_url(url, decode_responses=True)
        self._server, self._log = server, log
        self.struck: list[Struck] = []

    def victim(self, fault: str) -> Any:
        """A callback for the kit: called while the process stands still."""

        def note(worker: str, pid: int) -> None:
            held = self._held(worker)  # while the store is down this waits until it is back; the fault comes after it
            at_ms = round(time.time() * 1000)
            self.struck += [Struck(fault, at_ms, unit, kind) for unit, kind in held]

        return note

    def _held(self, worker: str) -> list[tuple[str, str]]:
        until = time.monotonic() + 5
        while True:
            try:
                units = sorted(self._redis.smembers(f"agentmesh:wl:{worker}"))
                records = [self._redis.hget(f"agentmesh:st:{run_of(u)}", key_of(u)) for u in units]
                break
            except redis.RedisError:  # the store is down too; what it held it still holds when it is back
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        entries = [json.loads(r) if r and r.startswith("{") else {} for r in records]
        kinds = [
            "Ask" if entry.get("limited") else "Call" if unit[0] == "s" else ""
            for unit, entry in zip(units, entries, strict=True)
        ]
        return list(zip(units, kinds, strict=True))

    def count(self, mesh: Mesh, results: dict[str, Any], tally: Tally, outages: Sequence[float]) -> Tally:
        """Fill in what was found; `results` has what each run gave, or the error, `outages` when the store was killed."""
        tally.runs = len(results)
        for task, result in results.items():
            if isinstance(result, TimeoutError):
                tally.hung += 1
                tally.notes.append(f"hung: {task}")
            elif result != expected(task):
                tally.lost += 1
                tally.notes.append(f"lost: {task}: {result!r}"[:300])
        ended: dict[str, int] = {}
        for task in results:
            for member in mesh.get(task).tree():
                events = member.events()
                ends = Counter(e.n for e in events if isinstance(e, StepDone | StepFailed))
                tally.double += repeats(ends)
                for e in events:
                    if isinstance(e, StepDone | StepFailed):
                        ended.setdefault(f"s|{member}|{e.n}", e.at_ms)
        before: Counter[str] = Counter()
        for s in self.struck:
            before[s.unit] += 1
            if s.unit in ended and ended[s.unit] >= s.at_ms:
                store_down = any(s.at_ms / 1000 - 1 < out < ended[s.unit] / 1000 for out in outages)
                fault = f"{s.fault}, the store down as well" if store_down else s.fault
                fault += ", struck again: a suspect" if before[s.unit] > 1 else ""
                tally.resume_s.setdefault(fault, []).append((ended[s.unit] - s.at_ms) / 1000)
        asked = Counter(json.dumps(r.body["messages"]) for r in self._server.requests)
        tally.llm_repeated = repeats(asked)
        tally.llm_excused = sum(s.kind == "Ask" for s in self.struck)
        done = Counter(self._log.read_text().split())
        tally.tools_repeated = repeats(done)
        tally.tools_excused = sum(s.kind == "Call" for s in self.struck)
        return tally


def run_of(unit: str) -> str:
    """The run of a unit `s|run|n`."""
    return unit.split("|")[1]


def key_of(unit: str) -> str:
    """Its record's key: a step's number, or the letter of an advance."""
    letter, _, n = unit.split("|") if unit.count("|") == 2 else (*unit.split("|"), "")
    return n or letter


def quantile(values: list[float], q: float) -> float:
    """The q-quantile; 0 of nothing."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[round(q * 100) - 1]


def repeats(counted: Counter[Any]) -> int:
    """How many were there more than once, each time counted."""
    return sum(n - 1 for n in counted.values())
