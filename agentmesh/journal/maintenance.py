"""The maintenance verbs: renew, release, signal (a human decision), sweep (timers and leases), notified (the canvas has its result).

The other half of the protocol; the same rules as protocol.py.
"""

from agentmesh.journal.protocol import NO_LINES, VERBS, Args, Reply, refuse, same_fence, split_unit
from agentmesh.journal.quarantine import clear_suspicion, forget_silent_workers, on_death, on_sign_of_life, on_silence
from agentmesh.journal.transaction import Record, Transaction, lane_of

SWEEPER_LOCK_MS = 3000
EMPTY_MS = 1000
STALE_CHECK_MS = SWEEPER_LOCK_MS + 1000  # a dead sweeper's turn must end before the next one looks
MAX_IDLE_MS = 2000  # how far ahead a sweep looks
SILENT_MS = 86_400_000


def signal(s: Transaction, a: Args) -> Reply:
    """A human decision: Approved, Denied, RunCancelled, LimitRaised, StepResolved, StepRevived. Needs no crew code."""
    run, kind = a["run"], a["kind"]
    if not s.t.hget(f"run:{run}", "status"):
        return refuse("unknown")
    if not s.is_open(run):
        return refuse("ended", s.t.hget(f"run:{run}", "status"))
    if kind == "RunCancelled":
        s.t.sadd("cancelled", run)
        s.end_run(run, "cancelled", a["event"], a.get("up", ""), False)
    elif kind == "LimitRaised":
        raise_limits(s, run, a)
    elif a["n"] == 0:
        rec = s.rec(run, "a")
        if not isinstance(rec, dict) or rec["st"] != "held":
            return refuse("not_waiting")
        if kind != "StepRevived" and a.get("action") != "retry":  # a run is not a step that could be done or failed
            return refuse("run", rec["why"])
        s.event(run, a["event"])
        rec["why"] = ""
        s.put(run, "a", rec)
        s.advance(run)
    else:
        return signal_step(s, run, kind, a)
    return {"ok": 1, "version": s.t.length(f"ev:{run}")}, NO_LINES


def signal_step(s: Transaction, run: str, kind: str, a: Args) -> Reply:
    """A decision about one waiting step."""
    n, key = a["n"], str(a["n"])
    unit = f"s|{run}|{n}"
    rec = s.rec(run, key)
    if not isinstance(rec, dict) or rec["st"] != "held":
        return refuse("not_waiting", "ended" if isinstance(rec, str) else "")
    action = a.get("action")
    is_decision = lane_of(rec) == "held"  # a person ends it; a worker cannot
    if not may_decide(kind, action, rec["why"], is_decision):
        return refuse("not_waiting", rec["why"])
    s.event(run, a["event"])
    if kind == "Denied" or (kind == "Approved" and is_decision) or action in ("done", "failed"):
        s.end_step(run, n, rec, kind != "Denied" and action != "failed", 0)
        if not rec["g"]:
            s.advance(run)
    else:
        s.leave(unit, rec)
        rec["lost"] = 1 if kind == "StepRevived" and rec.get("once") else 0
        clear_suspicion(rec)
        s.enqueue(unit, run, key, rec)
    return {"ok": 1, "version": s.t.length(f"ev:{run}")}, NO_LINES


def may_decide(kind: str, action: str | None, why: str, is_decision: bool) -> bool:
    """Whether this decision is one that the step waits for."""
    if kind in ("Approved", "Denied"):
        return why == "approve"
    if kind == "StepResolved":
        return why in ("in_doubt", "quarantined") or (is_decision and why != "approve" and action != "retry")
    return why not in ("approve", "in_doubt") and not is_decision  # StepRevived: those are a decision, not a revival


def raise_limits(s: Transaction, run: str, a: Args) -> None:
    """New ceilings for the tree; what they held is queued, and the root is advanced."""
    root = run.partition("/")[0]
    head = f"run:{root}"
    s.event(root, a["event"])
    for name, value in a["limits"].items():
        s.t.hset(head, f"lim_{name}", value)
    for member in s.t.smembers(f"tree:{root}"):
        for key in sorted(s.t.hashes[f"st:{member}"]):
            rec = s.rec(member, key)
            if isinstance(rec, dict) and rec["st"] == "held" and rec["why"].startswith("limit:"):
                unit = f"s|{member}|{key}"
                s.leave(unit, rec)
                s.enqueue(unit, member, key, rec)
    s.advance(root)


def renew(s: Transaction, a: Args) -> Reply:
    """Push deadlines; answers the leases that another worker has now, or whose run was cancelled."""
    lost = []
    on_sign_of_life(s, a["worker"])
    for unit, fence in a["leases"]:
        letter, run, key = split_unit(unit)
        rec = s.rec(run, key)
        mine = isinstance(rec, dict) and rec["st"] == "leased" and same_fence(rec, fence)
        still_needed = letter == "f" or (s.is_open(run) and not s.is_cancelled(run))
        if mine and still_needed:
            s.t.zadd("leased", unit, s.now + a["ttl"])
        else:
            lost.append(unit)
    return {"ok": 1}, lost


def release(s: Transaction, a: Args) -> Reply:
    """Queue everything that the worker had leased, and mark its queues so that messages it had taken are sent again."""
    units = s.t.smembers(f"wl:{a['worker']}")
    if a.get("below"):
        units += [unit for unit in s.t.zupto("leased", 1 << 52, 1 << 31) if is_below(s, unit, a["worker"])]
    for unit in units:
        _, run, key = split_unit(unit)
        rec = s.rec(run, key)
        if isinstance(rec, dict) and rec["st"] == "leased" and f"{rec['w']}/".startswith(f"{a['worker']}/"):
            if a.get("crashed"):
                on_death(s, unit, run, key, rec, len(units), seen=True)
            else:
                s.give_back(unit, run, key, rec, crashed=False)
    if s.t.hget("meta", "sweeper") == a["worker"]:
        s.t.hset("meta", "sweeper_until", s.now)  # it was the sweeper: the next worker to ask becomes it
    for queue in a.get("queues", ()):
        s.t.hset("qsnap", queue, f"{s.t.hget('qmax', queue) or 0} {s.now}")
    return {"ok": 1, "count": len(units)}, NO_LINES


def is_below(s: Transaction, unit: str, worker: str) -> bool:
    """Whether a process of this worker's pool, named `WORKER/PID`, has leased the unit."""
    _, run, key = split_unit(unit)
    rec = s.rec(run, key)
    return isinstance(rec, dict) and rec.get("w", "").startswith(f"{worker}/")


def notified(s: Transaction, a: Args) -> Reply:
    """The canvas has its result: the run's last entry goes."""
    rec = s.rec(a["run"], "f")
    if isinstance(rec, dict):
        s.drop(f"f|{a['run']}", a["run"], "f", rec, "E0")
    return {"ok": 1}, NO_LINES


def sweep(s: Transaction, a: Args) -> Reply:
    """Expired leases, due entries, overdue messages, cancelled trees, retention; by one sweeper at a time."""
    holder, until = s.t.hget("meta", "sweeper"), s.t.hget("meta", "sweeper_until") or 0
    if holder and holder != a["worker"] and until > s.now:
        return {"ok": 0, "count": 0, "rest": until - s.now}, NO_LINES
    s.t.hset("meta", "sweeper", a["worker"])
    s.t.hset("meta", "sweeper_until", s.now + SWEEPER_LOCK_MS)
    if a.get("boot") and a["boot"] != s.t.hget("meta", "boot"):
        # The store was down and no lease could be renewed: nothing expires for one TTL.
        if s.t.hget("meta", "boot"):
            s.t.hset("meta", "grace", s.now + a["ttl"])
        s.t.hset("meta", "boot", a["boot"])
    limit = a["limit"]
    count = 0 if (s.t.hget("meta", "grace") or 0) > s.now else expire_leases(s, limit)
    count += fire_due(s, limit)
    empty = {*a.get("empty", ()), *(long_empty(s) if a.get("look") else ())}
    for queue in s.t.smembers("queues"):
        count += resend(s, queue, limit, queue in empty)
    for run in s.t.smembers("cancelled"):
        count += cancel_below(s, run, limit)
    forget_silent_workers(s, s.now - SILENT_MS, limit)
    if a.get("retain"):
        count += delete_expired(s, s.now - a["retain"], limit)
    rest = 0 if count else idle_ms(s)
    if rest:  # any other worker may sweep meanwhile
        s.t.hset("meta", "sweeper_until", s.now)
    return {"ok": 1, "count": count, "rest": rest}, NO_LINES


def long_empty(s: Transaction) -> set[str]:
    """The broker's lists, where this store is the broker, that were empty at every sweep for a second."""
    looked = s.t.hget("meta", "looked") or 0
    if not looked <= s.now <= looked + STALE_CHECK_MS:  # no sweeper looked meanwhile, or the clock was set back
        for queue in s.t.smembers("queues"):
            s.t.hdel("empty", queue)
    s.t.hset("meta", "looked", s.now)
    empty = set()
    for queue in s.t.smembers("queues"):
        since = s.t.hget("empty", queue)
        if s.t.length(queue):
            s.t.hdel("empty", queue)
        elif since is None:
            s.t.hset("empty", queue, s.now)
        elif s.now - since >= EMPTY_MS:
            empty.add(queue)
    return empty


def idle_ms(s: Transaction) -> int:
    """For how long no sweep is needed, if nothing new comes: nothing is leased or queued, and no timer is near."""
    queued = any(s.t.zupto(f"q:{queue}", 1 << 52, 1) for queue in s.t.smembers("queues"))
    if queued or s.t.zupto("leased", 1 << 52, 1) or s.t.smembers("cancelled"):
        return 0
    first = s.t.zupto("due", s.now + MAX_IDLE_MS, 1)
    return int(s.t.zscore("due", first[0]) or s.now) - s.now if first else MAX_IDLE_MS


def expire_leases(s: Transaction, limit: int) -> int:
    """Leases whose deadline has passed are given back."""
    units = s.t.zupto("leased", s.now, limit)
    for unit in units:
        letter, run, key = split_unit(unit)
        rec = s.rec(run, key)
        if not isinstance(rec, dict) or rec["st"] != "leased":  # of a run that was deleted, and whose id was used again
            s.t.zrem("leased", unit)
        elif letter != "f" and not s.is_open(run):
            s.drop(unit, run, key, rec, "E0")
        else:
            on_death(s, unit, run, key, rec, on_silence(s, rec["w"]), seen=False)
    return len(units)


def fire_due(s: Transaction, limit: int) -> int:
    """Due entries: a gather's deadline closes it, a step of lane `due` ends, anything else is queued."""
    units = s.t.zupto("due", s.now, limit)
    for unit in units:
        letter, run, key = split_unit(unit)
        s.t.zrem("due", unit)
        if letter == "g":
            g = s.t.hget(f"ga:{run}", key)
            if s.is_open(run) and g and not g["closed"]:
                s.close(run, int(key), dict(g), "deadline")
            continue
        rec = s.rec(run, key)
        if not isinstance(rec, dict) or not s.is_open(run):
            continue
        if lane_of(rec) == "due":
            s.event(run, f'{{"e":"Woken","n":{key}}}')
            s.end_step(run, int(key), rec, True, 0)
            if not rec["g"]:
                s.advance(run)
        else:
            s.enqueue(unit, run, key, rec)
    return len(units)


def resend(s: Transaction, queue: str, limit: int, empty: bool) -> int:
    """Send entries again whose message must be lost: a later one was claimed a second ago, or their queue is empty."""
    top = s.t.hget("qmax", queue) or 0
    snap, _, at = str(s.t.hget("qsnap", queue) or f"{top} {s.now}").partition(" ")
    overdue = 1 << 52 if empty else int(snap) - 1
    count = 0
    for unit in s.t.zupto(f"q:{queue}", overdue, limit):
        _, run, key = split_unit(unit)
        rec = s.rec(run, key)
        if not isinstance(rec, dict) or rec["st"] != "queued":
            s.t.zrem(f"q:{queue}", unit)
        elif rec["rt"] <= s.now:
            resend_entry(s, unit, run, key, rec)
            count += 1
    if s.now - int(at or s.now) >= 1000 or not s.t.hget("qsnap", queue):
        s.t.hset("qsnap", queue, f"{top} {s.now}")
    return count


def resend_entry(s: Transaction, unit: str, run: str, key: str, rec: Record) -> None:
    """Send an entry's message again, and the next time after twice as long; it keeps its place in the queue."""
    rec["rs"] += 1
    rec["rt"] = s.now + (1000 << min(rec["rs"], 6))
    s.put(run, key, rec)
    queue, head, tail = s.t.hget("wires", unit).split("\0")
    if rec["rs"] < 3 or rec["rs"] % 2 == 0:  # else to its own queue: perhaps no worker takes suspects
        queue = rec["q"]
    s.sent.append((queue, head, int(s.t.hincr("meta", "seq")), tail))


def cancel_below(s: Transaction, run: str, limit: int) -> int:
    """RunCancelled for the runs below a cancelled one, `limit` at most."""
    root = run.partition("/")[0]
    count, more = 0, False
    for member in s.t.smembers(f"tree:{root}"):
        below = member == run or member.startswith(f"{run}/")
        if not below or not s.is_open(member):
            continue
        if count >= limit:
            more = True
            break
        count += 1
        up = f'{{"e":"StepFailed","n":{member.rpartition("/")[2]},"error":{cancelled_error(member)}}}'
        s.end_run(member, "cancelled", '{"e":"RunCancelled","by":"parent"}', up, False)
    if not more:  # all have ended, which refuses whatever is still written to them
        s.t.srem("cancelled", run)
    return count


def delete_expired(s: Transaction, before: int, limit: int) -> int:
    """Delete the trees whose root ended before: the only way in which a finished run is deleted."""
    roots = s.t.zupto("forget", before, limit)
    for root in roots:
        for run in s.t.smembers(f"tree:{root}"):
            for first in s.t.hashes.get(f"ga:{run}", ()):
                s.t.lists.pop(f"ge:{run}|{first}", None)
            for key in ("run", "st", "ga"):
                s.t.hashes.pop(f"{key}:{run}", None)
            s.t.lists.pop(f"ev:{run}", None)
        s.t.sets.pop(f"tree:{root}", None)
        s.t.zrem("runs", root)
        s.t.zrem("forget", root)
    return len(roots)


def cancelled_error(child: str) -> str:
    """DelegateFailed, as the parent of a cancelled run gets it."""
    return f'{{"type":"DelegateFailed","message":"run {child} was cancelled","child":"{child}"}}'


ALL_VERBS = {**VERBS, "renew": renew, "release": release, "signal": signal, "sweep": sweep, "notified": notified}
