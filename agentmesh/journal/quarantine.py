"""Poison pills: which step crashed its process. The second crash makes a suspect, three crashes alone quarantine it.

A suspect carries `room`: how many units may be in flight at once in its worker, itself included. Each crash quarters it,
so that one poison pill among 500 is alone after five. `d` counts crashes, `c` those alone, `x` names the workers whose
lease on it expired while it was alone: each counts until that worker renews a lease, for it may only have been paused.
"""

from agentmesh.journal.transaction import Record, Transaction

SUSPECT_DEATHS, POISON_DEATHS = 2, 3


def on_death(s: Transaction, unit: str, run: str, key: str, rec: Record, in_flight: int, *, seen: bool) -> None:
    """A worker died with `in_flight` units leased, this one among them; `seen`: by a supervisor, else its lease expired."""
    if unit[0] != "f":
        rec["d"] = rec.get("d", 0) + 1
        if in_flight == 1 and seen:
            rec["c"] = rec.get("c", 0) + 1
        elif in_flight == 1:
            rec["x"] = f"{rec.get('x', '')}{rec['w']}\n"
        if rec["d"] >= SUSPECT_DEATHS:
            rec["room"] = max(1, in_flight // 4)
        crashes = rec.get("c", 0) + sum(s.t.hget("silent", w) is not None for w in rec.get("x", "").split("\n") if w)
        if crashes >= POISON_DEATHS and s.is_open(run):
            s.leave(unit, rec)
            rec["lost"] = 1
            n = 0 if key == "a" else int(key)
            s.event(run, f'{{"e":"StepQuarantined","n":{n},"crashes":{crashes}}}')
            s.hold(unit, run, key, rec, "quarantined")
            return
    s.give_back(unit, run, key, rec, crashed=True)


def on_silence(s: Transaction, worker: str) -> int:
    """How many units a worker had leased when the first of its leases expired."""
    count = s.t.hget("silent", worker)
    if count is None:
        count = len(s.t.smembers(f"wl:{worker}"))
        s.t.hset("silent", worker, count)
        s.t.zadd("silent_at", worker, s.now)
    return int(count)


def on_sign_of_life(s: Transaction, worker: str) -> None:
    """A worker that fell silent renews its leases: it is not dead."""
    if s.t.hget("silent", worker) is not None:
        s.t.hdel("silent", worker)
        s.t.zrem("silent_at", worker)


def forget_silent_workers(s: Transaction, before: int, limit: int) -> None:
    """Forget the workers that fell silent before then."""
    for worker in s.t.zupto("silent_at", before, limit):
        on_sign_of_life(s, worker)


def room_limit(s: Transaction, worker: str, rec: Record) -> int:
    """0 when the worker may take this unit beside what it has leased; else how many it may have leased at most."""
    cell, room = s.t.hget("cell", worker), rec.get("room", 0)
    if not room and cell is None:
        return 0
    in_flight = len(s.t.smembers(f"wl:{worker}"))
    if not in_flight:
        return 0
    if not room or cell is None:  # suspects are not mixed with others
        return 1
    most = min(room, int(cell))
    return 0 if in_flight < most else most


def take_suspect(s: Transaction, worker: str, rec: Record) -> None:
    """The worker has leased a suspect: what it leases beside it must fit into its room."""
    if rec.get("room"):
        cell = s.t.hget("cell", worker)
        s.t.hset("cell", worker, rec["room"] if cell is None else min(rec["room"], int(cell)))


def clear_suspicion(rec: Record) -> None:
    """It reported an attempt's end, or a person released it."""
    for name in ("d", "c", "x", "room"):
        rec.pop(name, None)
