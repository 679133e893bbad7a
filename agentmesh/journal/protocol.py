"""The protocol: each verb a pure function of the store, its time and its arguments; the only writes there are.

Arguments and answers are JSON values; events are opaque texts. The Lua scripts beside this file do the same,
and a differential test holds them equal. Source: docs/architecture.md, "The protocol".
"""

from collections.abc import Callable
from typing import Any

from agentmesh.journal.quarantine import clear_suspicion, room_limit, take_suspect
from agentmesh.journal.retry_import import count_ended_members, import_events, is_same_start, planned_state
from agentmesh.journal.transaction import SUSPECTS, VERSION_TRIES, VERSION_WAIT_MS, Record, Transaction, is_limited

Args = dict[str, Any]
Reply = tuple[dict[str, Any], list[str]]
NO_LINES: list[str] = []


def refuse(why: str, detail: str = "") -> Reply:
    """The answer of a verb that was not done, and why."""
    return {"no": why, "detail": detail}, NO_LINES


def split_unit(unit: str) -> tuple[str, str, str]:
    """A unit's letter, its run and the key of its record."""
    letter, _, rest = unit.partition("|")
    run, _, n = rest.partition("|")
    return letter, run, n or letter


def begin(s: Transaction, a: Args) -> Reply:
    """RunStarted and the run's first entries together; the same id with the same spec answers what is there."""
    run = a["run"]
    if s.t.hget(f"run:{run}", "status"):
        if s.t.hget(f"run:{run}", "digest") != a["digest"]:
            return refuse("exists")
        return {"ok": 1, "version": s.t.length(f"ev:{run}"), "again": 1}, NO_LINES
    for carried in a.get("carried", ()):
        import_events(s, carried)
    start_run(s, run, a["spec"], a["started"], a["digest"])
    s.t.zadd("runs", run, s.now)
    if a["next"]:
        apply_next(s, run, a["next"])
    else:
        s.advance(run)
    return {"ok": 1, "version": s.t.length(f"ev:{run}")}, NO_LINES


def start_run(s: Transaction, run: str, spec: Args, text: str, digest: str = "") -> None:
    """A run's head and its first fact."""
    head = {**spec, "status": "open", "started": s.now, "digest": digest}
    for name, value in head.items():
        s.t.hset(f"run:{run}", name, value)
    if not is_same_start(s, run, text):
        s.event(run, text)
    s.t.sadd(f"tree:{run.partition('/')[0]}", run)
    s.t.zadd("open", run, s.now)


def claim(s: Transaction, a: Args) -> Reply:
    """An entry into a lease with a new fence; the same token gets the same answer."""
    unit = a["unit"]
    letter, run, key = split_unit(unit)
    rec = s.rec(run, key)
    if not isinstance(rec, dict):
        return refuse("ended" if rec else "unknown")
    if letter != "f" and not s.is_open(run):
        s.drop(unit, run, key, rec, "E0")
        return refuse("ended")
    if s.is_cancelled(run) and letter != "f":
        return refuse("cancelled")
    if rec["st"] == "leased":
        return claim_reply(s, a, run, rec) if rec["tok"] == a["token"] else refuse("busy")
    if rec["st"] != "queued":
        return refuse("held" if rec["st"] == "held" else "later")
    if a.get("apart") and rec.get("room"):
        return refuse("apart")
    most = room_limit(s, a["worker"], rec)
    if most:
        return refuse("room", str(most))
    put_off = why_not_claimable(s, a, unit, run, key, rec)
    if put_off:
        return put_off
    seq = s.t.zscore(f"q:{rec['q']}", unit) or 0
    if seq > (s.t.hget("qmax", rec["q"]) or 0):
        s.t.hset("qmax", rec["q"], seq)
    s.leave(unit, rec)
    rec.pop("v", None)
    rec.update(st="leased", f=int(s.t.hincr("meta", "fence")), tok=a["token"], w=a["worker"], a=rec["a"] + 1)
    s.put(run, key, rec)
    s.t.zadd("leased", unit, s.now + a["ttl"])
    s.t.sadd(f"wl:{a['worker']}", unit)
    take_suspect(s, a["worker"], rec)
    return claim_reply(s, a, run, rec)


def claim_reply(s: Transaction, a: Args, run: str, rec: Record) -> Reply:
    """The answer to a claim that was granted."""
    events = s.t.tail(f"ev:{run}", a["version"])
    doubt = 1 if rec.get("once") and rec.get("lost") else 0
    reply = {"ok": 1, "fence": rec["f"], "attempt": rec["a"], "doubt": doubt, "limit": rec.get("limit", "")}
    return {**reply, "version": s.t.length(f"ev:{run}")}, events


def why_not_claimable(s: Transaction, a: Args, unit: str, run: str, key: str, rec: Record) -> Reply | None:
    """Why this entry may not be worked on by this worker now."""
    head = s.t.hashes[f"run:{run}"]
    if head["crew"] != a["crew"] or head["version"] != a["crew_version"]:
        requeue_for_other_version(s, unit, run, key, rec, f"version:{head['crew']} {head['version']}")
        return refuse("version", f"{head['crew']} {head['version']}")
    if is_limited(rec):
        limit = limit_reached(s, run)
        if limit and s.t.hget(f"run:{run.partition('/')[0]}", "on_limit") == "fail":
            rec["limit"] = limit
        elif limit:
            s.leave(unit, rec)
            s.hold(unit, run, key, rec, f"limit:{limit}")
            return refuse("held", f"limit:{limit}")
    if rec.get("once") and rec.get("lost") and not rec.get("rec"):
        s.leave(unit, rec)
        s.event(run, f'{{"e":"StepInDoubt","n":{key},"attempt":{rec["a"]}}}')
        s.hold(unit, run, key, rec, "in_doubt")
        return refuse("held", "in_doubt")
    if a.get("rate_ms"):
        queue = rec["q"].removesuffix(SUSPECTS)
        at = s.t.hget("rate", queue) or 0
        if at > s.now + a["rate_ms"] * a["burst"]:
            s.leave(unit, rec)
            s.wait_until(unit, run, key, rec, at - a["rate_ms"] * a["burst"])
            return refuse("later", "rate")
        s.t.hset("rate", queue, max(at, s.now) + a["rate_ms"])
    return None


def requeue_for_other_version(s: Transaction, unit: str, run: str, key: str, rec: Record, why: str) -> None:
    """A worker of another version claimed it: queue it again at once, a few times; then after longer and longer waits.

    After each wait it is queued twice in a row: the broker may give it to the same worker each time that it comes due.
    """
    s.leave(unit, rec)
    rec["v"] = rec.get("v", 0) + 1
    if rec["v"] <= VERSION_TRIES or rec["v"] % 2:
        s.enqueue(unit, run, key, rec)
        return
    rec["why"] = why
    wait_ms = min(VERSION_WAIT_MS, 125 << min(rec["v"] - VERSION_TRIES, 6))
    s.wait_until(unit, run, key, rec, s.now + wait_ms)


def limit_reached(s: Transaction, run: str) -> str:
    """The first limit that the run's tree has reached, or nothing."""
    head = s.t.hashes[f"run:{run.partition('/')[0]}"]
    for limit, total in (("turns", "turns"), ("tokens", "tokens"), ("cost_usd", "usd")):
        if head.get(f"lim_{limit}") is not None and head.get(total, 0) >= head[f"lim_{limit}"]:
            return limit
    seconds = head.get("lim_seconds")
    waited = head.get("held_ms", 0) + (s.now - head["held_since"] if head.get("held_n") else 0)
    if seconds is not None and s.now - head["started"] - waited >= seconds * 1000:
        return "seconds"
    return ""


def same_fence(rec: Record, fence: int) -> bool:
    """Whether the fence is still the newest."""
    return bool(rec["f"] == fence)


def commit(s: Transaction, a: Args) -> Reply:
    """A step's end, first under the newest fence: with what comes next (lone), or counted in its gather (member).

    Its twin is lua/commit.lua.
    """
    unit, fence = a["unit"], a["fence"]
    _, run, key = split_unit(unit)
    rec = s.rec(run, key)
    if rec == f"E{fence}" or (isinstance(rec, dict) and rec.get("tf") == fence):
        return {"ok": 1, "version": s.t.length(f"ev:{run}"), "again": 1}, NO_LINES
    s.charge(run, a.get("usage", {}))
    if not isinstance(rec, dict) or not same_fence(rec, fence) or not s.is_open(run) or s.is_cancelled(run):
        s.t.hincr(f"run:{run.partition('/')[0]}", "refused")
        return refuse("stale")
    before = s.t.length(f"ev:{run}")
    s.event(run, a["event"])
    if a["how"] in ("retried", "doubt"):
        rec["tf"] = fence  # a client that lost the reply repeats this commit
    if a["how"] == "retried":
        s.leave(unit, rec)
        rec["lost"] = 0
        clear_suspicion(rec)
        if a.get("delay"):
            s.wait_until(unit, run, key, rec, s.now + a["delay"])
        else:
            s.enqueue(unit, run, key, rec)
    elif a["how"] == "doubt":
        s.leave(unit, rec)
        s.hold(unit, run, key, rec, "in_doubt")
    else:
        s.end_step(run, int(key), rec, a["how"] == "done", fence)
        if not rec["g"]:
            plan_after_lone_step(s, run, a, before)
    return {"ok": 1, "version": s.t.length(f"ev:{run}"), "conflict": int(before != a["version"])}, NO_LINES


def plan_after_lone_step(s: Transaction, run: str, a: Args, before: int) -> None:
    """What comes after a lone step: in the same transaction if nothing was written in between, else by an advance."""
    if a.get("next") and before == a["version"]:
        apply_next(s, run, a["next"])
    else:
        s.advance(run)


def hold(s: Transaction, a: Args) -> Reply:
    """Hold a leased entry for a decision, because its run no longer replays; `why` says what is wrong."""
    unit = a["unit"]
    _, run, key = split_unit(unit)
    rec = s.rec(run, key)
    if not isinstance(rec, dict) or not same_fence(rec, a["fence"]) or not s.is_open(run):
        return refuse("stale")
    if rec["st"] == "leased":
        s.leave(unit, rec)
        s.hold(unit, run, key, rec, a["why"])
    return {"ok": 1}, NO_LINES


def plan(s: Transaction, a: Args) -> Reply:
    """What an advance planned; removes that advance."""
    run = a["run"]
    rec = s.rec(run, "a")
    if rec == f"E{a['fence']}":
        return {"ok": 1, "version": s.t.length(f"ev:{run}"), "again": 1}, NO_LINES
    if not isinstance(rec, dict) or not same_fence(rec, a["fence"]):
        return refuse("stale")
    if not s.is_open(run):
        s.drop(f"a|{run}", run, "a", rec, "E0")
        return refuse("ended")
    if s.is_cancelled(run):
        return refuse("cancelled")
    if s.t.length(f"ev:{run}") != a["version"]:
        return {"no": "conflict", "version": s.t.length(f"ev:{run}")}, s.t.tail(f"ev:{run}", a["version"])
    s.drop(f"a|{run}", run, "a", rec, f"E{a['fence']}")
    apply_next(s, run, a["next"])
    return {"ok": 1, "version": s.t.length(f"ev:{run}")}, NO_LINES


def apply_next(s: Transaction, run: str, nxt: Args) -> None:
    """Plan steps, open their gather, or end the run: the `next` of begin, commit and plan."""
    g = nxt.get("gather")
    if g:
        joined = {"last": g["last"], "need": g["need"], "everyone": g["everyone"], "left": g["last"] - g["first"] + 1}
        joined |= {"ok": 0, "closed": 0, "next": g["first"] + g["window"] if g["window"] else 0}
        s.t.hset(f"ga:{run}", str(g["first"]), joined)
        if g["deadline"]:
            s.t.zadd("due", f"g|{run}|{g['first']}", s.now + g["deadline"])
    plans = nxt.get("plans", [])
    for p in plans:
        plan_step(s, run, p, g)
    if g:
        count_ended_members(s, run, plans, g)
    for p in plans:  # after all are planned: an end may close the gather, which must have all its members
        rec = s.rec(run, str(p["n"]))
        if p["state"] == "ended" and isinstance(rec, dict):
            s.event(run, p["end"])
            s.end_step(run, p["n"], rec, False, 0)
    end = nxt.get("end")
    if end:
        s.end_run(run, end["status"], end["event"], end.get("up", ""), bool(end.get("up_ok")))


def plan_step(s: Transaction, run: str, p: Args, g: Args | None) -> None:
    """Plan one step: its event, its record and its entry."""
    n = p["n"]
    rec: Record = {"st": "new", "g": g["first"] if g else 0, "f": 0, "a": 0}
    state = planned_state(s.rec(run, str(n)), p, rec)
    if not state:
        return
    unit = f"s|{run}|{n}"
    s.event(run, p["event"])
    for flag in ("kind", "lane", "limited", "once", "rec"):
        if p.get(flag):
            rec[flag] = p[flag]
    if p.get("wire"):
        s.t.hset("wires", unit, p["wire"])
    backlog = g and g["window"] and n >= g["first"] + g["window"]
    if state == "child":
        child = f"{run}/{n}"
        start_run(s, child, p["child"]["spec"], p["child"]["started"])
        rec["st"] = "backlog" if backlog else "child"
        s.put(run, str(n), rec)
        if not backlog:
            s.advance(child)
    elif state == "queued" and backlog:
        rec["st"] = "backlog"
        s.put(run, str(n), rec)
    elif state == "queued":
        s.enqueue(unit, run, str(n), rec)
    elif state == "held":
        s.hold(unit, run, str(n), rec, p["held"])
    elif state == "due":
        s.wait_until(unit, run, str(n), rec, s.now + p["due"])
    else:
        s.put(run, str(n), rec)


VERBS: dict[str, Callable[[Transaction, Args], Reply]] = {
    "begin": begin,
    "claim": claim,
    "commit": commit,
    "plan": plan,
    "hold": hold,
}
