"""Poison: which step killed its process. A second death makes a suspect, three deaths alone hold it as quarantined.

A suspect carries `room`: how many units may be in hand beside each other in its worker, itself included. Each death
quarters it, so that one poison among 500 is alone after five. `d` counts deaths, `c` those alone, `x` the workers whose
lease on it ran out while it was alone: each counts until that worker is heard of again, for it may only have slept.
"""

from agentmesh.journal.transaction import Record, Transaction

SUSPECT_DEATHS, POISON_DEATHS = 2, 3


def on_death(s: Transaction, unit: str, run: str, key: str, rec: Record, hand: int, *, seen: bool) -> None:
    """A lease whose worker died with `hand` units in hand; `seen` by a supervisor, or only silent since its lease ran out."""
    if unit[0] != "f":
        rec["d"] = rec.get("d", 0) + 1
        if hand == 1 and seen:
            rec["c"] = rec.get("c", 0) + 1
        elif hand == 1:
            rec["x"] = f"{rec.get('x', '')}{rec['w']}\n"
        if rec["d"] >= SUSPECT_DEATHS:
            rec["room"] = max(1, hand // 4)
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
    """How many units a worker had in hand when the first of its leases ran out."""
    count = s.t.hget("silent", worker)
    if count is None:
        count = len(s.t.smembers(f"wl:{worker}"))
        s.t.hset("silent", worker, count)
        s.t.zadd("silent_at", worker, s.now)
    return int(count)


def on_sign_of_life(s: Transaction, worker: str) -> None:
    """A worker speaks: it had slept, and is not dead."""
    if s.t.hget("silent", worker) is not None:
        s.t.hdel("silent", worker)
        s.t.zrem("silent_at", worker)


def forget_silent_workers(s: Transaction, before: int, limit: int) -> None:
    """Names of workers that fell silent so long ago are let go."""
    for worker in s.t.zupto("silent_at", before, limit):
        on_sign_of_life(s, worker)


def room_limit(s: Transaction, worker: str, rec: Record) -> int:
    """0 when the worker may take this unit beside what it has in hand; else how many it may have in hand at most."""
    cell, room = s.t.hget("cell", worker), rec.get("room", 0)
    if not room and cell is None:
        return 0
    hand = len(s.t.smembers(f"wl:{worker}"))
    if not hand:
        return 0
    if not room or cell is None:  # suspects are not mixed with others
        return 1
    most = min(room, int(cell))
    return 0 if hand < most else most


def take_suspect(s: Transaction, worker: str, rec: Record) -> None:
    """A suspect goes into the worker's hand: what joins it must bear its room."""
    if rec.get("room"):
        cell = s.t.hget("cell", worker)
        s.t.hset("cell", worker, rec["room"] if cell is None else min(rec["room"], int(cell)))


def clear_suspicion(rec: Record) -> None:
    """It reported back, or a person vouched for it."""
    for name in ("d", "c", "x", "room"):
        rec.pop(name, None)
