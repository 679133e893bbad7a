"""Random flows for the simulation, and what a replay of one would plan next."""

import json
import random
from typing import Any

Stage = tuple[Any, ...]


def program(rng: random.Random, depth: int = 0) -> list[Stage]:
    """A random flow: what it asks for, one after the other."""
    stages: list[Stage] = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["step", "step", "gather", "gather", "sleep", "approve", "child"])
        if kind == "gather":
            k = rng.randint(2, 4)
            need = rng.choice([k, k, max(1, k - 1)])
            inner = program(rng, depth + 1) if depth < 2 and rng.random() < 0.4 else None
            stages.append(("gather", k, need, rng.choice([0, 0, 3_000]), inner, rng.choice([0, 2])))
        elif kind == "child" and depth < 2:
            stages.append(("child", program(rng, depth + 1)))
        elif kind in ("sleep", "approve"):
            stages.append((kind,))
        else:
            stages.append(("step",))
    return stages


def following(run: str, stages: list[Stage], lines: list[str]) -> dict[str, Any]:
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
    if inner:
        spec = {"crew": "c", "version": "", "agent": "A", "wire": message(f"a|{run}/{n}"), "parent": run, "n": n}
        return {**out, "state": "child", "child": {"spec": spec, "started": '{"e":"RunStarted"}'}}
    if kind == "Sleep":
        return {**out, "state": "due", "due": 1_500}
    if kind == "Approve":
        return {**out, "state": "held", "held": "approve"}
    return {**out, "state": "queued"}


def message(unit: str) -> str:
    """A rendered message that says only what it is for."""
    return f"q\0{unit}#\0"
