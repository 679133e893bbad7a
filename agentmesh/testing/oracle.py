"""Random flows for the simulation, what a replay of one would plan next, and the oracle that checks the store."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from agentmesh.journal.transaction import Tables

Stage = tuple[Any, ...]


def random_program(rng: random.Random, depth: int = 0) -> list[Stage]:
    """A random flow: its stages in order."""
    stages: list[Stage] = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["step", "step", "gather", "gather", "sleep", "approve", "child"])
        if kind == "gather":
            k = rng.randint(2, 4)
            need = rng.choice([k, k, max(1, k - 1)])
            inner = random_program(rng, depth + 1) if depth < 2 and rng.random() < 0.4 else None
            stages.append(("gather", k, need, rng.choice([0, 0, 3_000]), inner, rng.choice([0, 2])))
        elif kind == "child" and depth < 2:
            stages.append(("child", random_program(rng, depth + 1)))
        elif kind in ("sleep", "approve"):
            stages.append((kind,))
        else:
            stages.append(("step",))
    return stages


def next_plan(run: str, stages: list[Stage], lines: list[str]) -> dict[str, Any]:
    """What a replay of this flow would plan now, as the verbs take it."""
    events = [json.loads(line.partition(" ")[2]) for line in lines]
    planned = {e["n"] for e in events if e["e"] == "StepPlanned"}
    ended = {e["n"] for e in events if e["e"] in ("StepDone", "StepFailed", "Woken", "Approved", "Denied")}
    closed = {e["first"] for e in events if e["e"] == "GatherClosed"}
    n = 1
    for stage in stages:
        width = stage[1] if stage[0] == "gather" else 1
        if (n not in closed) if stage[0] == "gather" else (n not in ended):
            plans = [_plan(run, stage, n + i) for i in range(width) if n + i not in planned]
            if not plans:
                return {}
            if stage[0] != "gather":
                return {"plans": plans}
            _, k, need, deadline, _, window = stage
            gather = {
                "first": n,
                "last": n + k - 1,
                "need": need,
                "everyone": 0,
                "deadline": deadline,
                "window": window,
            }
            return {"plans": plans, "gather": gather}
        n += width
    up = json.dumps({"e": "StepDone", "n": int(run.rpartition("/")[2] or 0) if "/" in run else 0, "value": "child"})
    return {"end": {"status": "done", "event": '{"e":"RunDone","value":1}', "up": up, "up_ok": 1}}


def _plan(run: str, stage: Stage, n: int) -> dict[str, Any]:
    inner = stage[4] if stage[0] == "gather" else stage[1] if stage[0] == "child" else None
    kind = {"sleep": "Sleep", "approve": "Approve"}.get(stage[0], "Delegate" if inner else "Call")
    out = {
        "n": n,
        "kind": kind,
        "event": json.dumps({"e": "StepPlanned", "n": n, "kind": kind}),
        "wire": message(f"s|{run}|{n}"),
    }
    if n % 2:  # the others are of a time when entries did not say their lane, and their kind implied it
        lane = {"Sleep": "due", "Approve": "held", "Delegate": "child"}.get(kind, "")
        out |= {"lane": lane, "kind": f"New{kind}"} if lane else {}
    if inner:
        spec = {"crew": "c", "version": "", "agent": "A", "wire": message(f"a|{run}/{n}"), "parent": run, "n": n}
        return {**out, "state": "child", "child": {"spec": spec, "started": '{"e":"RunStarted"}'}}
    if kind == "Sleep":
        return {**out, "state": "due", "due": 1_500}
    if kind == "Approve":
        return {**out, "state": "held", "held": "approve"}
    return {**out, "state": "queued"}


def message(unit: str) -> str:
    """A rendered message that holds nothing but its unit."""
    return f"q\0{unit}#\0"


# ---- The oracle, outside the simulated store ----------------------------------------------------


class Violation(AssertionError):
    """The protocol broke a promise."""


class Oracle:
    """Checks what a protocol did to the tables against what it promises.

    Args:
        program_of: a run's flow, stage by stage.

    Raises:
        Violation: from `look` and `check_end`.
    """

    def __init__(self, tables: Tables, program_of: Callable[[str], list[Stage]]) -> None:
        self._tables, self._program_of = tables, program_of
        self.executed: Counter[str] = Counter()
        self.excuses: Counter[str] = Counter()  # crashes and retries
        self._seen: dict[str, int] = {}  # how many events of each run there were at the last look

    def look(self) -> None:
        """After a verb: no step or run ended twice, no run continued past an open step, every open run has an entry."""
        for run in [k[3:] for k in self._tables.lists if k.startswith("ev:")]:
            lines = self._tables.lists[f"ev:{run}"]
            if len(lines) != self._seen.get(run):
                self._seen[run] = len(lines)
                self._look_at(run, [json.loads(line.partition(" ")[2]) for line in lines])
            if self._tables.hget(f"run:{run}", "status") == "open" and not self._has_entry(run):
                raise Violation(f"open run {run} has no entry")

    def _look_at(self, run: str, events: list[dict[str, Any]]) -> None:
        ends = Counter(e["n"] for e in events if e["e"] in ("StepDone", "StepFailed", "Woken", "Approved"))
        twice = [n for n, count in ends.items() if count > 1]
        if twice:
            raise Violation(f"step {twice[0]} of {run} ended twice")
        closed = Counter(e["first"] for e in events if e["e"] == "GatherClosed")
        if any(count > 1 for count in closed.values()):
            raise Violation(f"a gather of {run} closed twice")
        if sum(e["e"] in ("RunDone", "RunFailed", "RunCancelled") for e in events) > 1:
            raise Violation(f"run {run} ended twice")
        at = 1
        planned = Counter(e["n"] for e in events if e["e"] == "StepPlanned")
        if any(count > 1 for count in planned.values()):
            raise Violation(f"a step of {run} was planned twice")
        good = {e["n"] for e in events if e["e"] in ("StepDone", "Woken", "Approved")}
        for stage in self._program_of(run):
            width = stage[1] if stage[0] == "gather" else 1
            through = at in closed if stage[0] == "gather" else at in ends
            if not through and max(planned, default=0) >= at + width:
                raise Violation(f"run {run} continued past step {at}, which has not ended")
            at += width
        for e in events:
            if e["e"] == "GatherClosed" and e["why"] in ("all", "need"):
                need = next(g["need"] for f, g in self._tables.hashes[f"ga:{run}"].items() if int(f) == e["first"])
                if len(good & set(e["members"])) < need:
                    raise Violation(f"the gather {e['first']} of {run} closed before {need} members had succeeded")

    def _has_entry(self, run: str) -> bool:
        z = self._tables.zsets
        for key, rec in self._tables.hashes[f"st:{run}"].items():
            if not isinstance(rec, dict):
                continue
            unit = f"a|{run}" if key == "a" else f"s|{run}|{key}"
            if rec["st"] == "child" and self._tables.hget(f"run:{run}/{key}", "status") == "open":
                return True
            if rec["st"] == "queued" and unit in z[f"q:{rec['q']}"]:
                return True
            if rec["st"] in ("leased", "due", "held") and unit in z[rec["st"]]:
                return True
        parent = run.rpartition("/")[0]
        rec = self._tables.hget(f"st:{parent}", run.rpartition("/")[2]) if parent else None
        waits = isinstance(rec, dict) and rec["st"] == "backlog"
        return waits or any(run == c or run.startswith(f"{c}/") for c in self._tables.sets["cancelled"])

    def check_end(self, runs: Iterable[str], cancelled: str, now: int) -> None:
        """When nothing is left to do: each run has ended as it should, and nothing was executed again without a cause."""
        for run in runs:
            status = self._tables.hget(f"run:{run}", "status")
            if status not in ("done", "cancelled") or (status == "cancelled" and run != cancelled):
                raise Violation(f"run {run} is {status} after {now} ms")
        for unit, count in self.executed.items():
            if count > 1 + self.excuses[unit]:
                raise Violation(
                    f"{unit} was executed {count} times, and {self.excuses[unit]} crashes or retries explain it"
                )
