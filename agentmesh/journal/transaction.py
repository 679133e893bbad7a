"""The abstract store that the protocol is written over: hashes, lists, sets and sorted sets by key.

Only what Redis has and with its meaning, so that each verb's Lua script can be read beside its Python.
"""

from collections import defaultdict
from typing import Any

from agentmesh.journal.events import LANES_BEFORE


class Tables:
    """A store in memory. Hash values may be any JSON value (Lua keeps dicts as JSON text)."""

    def __init__(self) -> None:
        self.hashes: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        self.lists: defaultdict[str, list[str]] = defaultdict(list)
        self.sets: defaultdict[str, set[str]] = defaultdict(set)
        self.zsets: defaultdict[str, dict[str, int]] = defaultdict(dict)

    # hashes
    def hget(self, key: str, field: str) -> Any:
        """The value, or None."""
        return self.hashes[key].get(field)

    def hset(self, key: str, field: str, value: Any) -> None:
        """Set one field."""
        self.hashes[key][field] = dict(value) if isinstance(value, dict) else value

    def hdel(self, key: str, field: str) -> None:
        """Drop one field, if there."""
        self.hashes[key].pop(field, None)

    def hincr(self, key: str, field: str, by: float = 1) -> float:
        """Add and answer the sum; a missing field is 0."""
        value: float = self.hashes[key].get(field, 0) + by
        self.hashes[key][field] = value
        return value

    # lists
    def push(self, key: str, text: str) -> int:
        """Append; answers the new length."""
        self.lists[key].append(text)
        return len(self.lists[key])

    def length(self, key: str) -> int:
        """How many."""
        return len(self.lists[key])

    def tail(self, key: str, after: int) -> list[str]:
        """Everything after the first `after`."""
        return self.lists[key][after:]

    # sets
    def sadd(self, key: str, member: str) -> bool:
        """Whether it is new."""
        new = member not in self.sets[key]
        self.sets[key].add(member)
        return new

    def srem(self, key: str, member: str) -> None:
        """Drop it, if there."""
        self.sets[key].discard(member)

    def smembers(self, key: str) -> list[str]:
        """All, sorted, so that two journals go through them alike."""
        return sorted(self.sets[key])

    def sismember(self, key: str, member: str) -> bool:
        """Whether it is there."""
        return member in self.sets[key]

    # sorted sets
    def zadd(self, key: str, member: str, score: int) -> None:
        """Set its score."""
        self.zsets[key][member] = score

    def zrem(self, key: str, member: str) -> None:
        """Drop it, if there."""
        self.zsets[key].pop(member, None)

    def zscore(self, key: str, member: str) -> int | None:
        """Its score, or None."""
        return self.zsets[key].get(member)

    def zupto(self, key: str, score: int, limit: int) -> list[str]:
        """Members with a score of at most `score`, lowest first, `limit` at most."""
        ranked = sorted((s, m) for m, s in self.zsets[key].items() if s <= score)
        return [m for _, m in ranked[:limit]]


# ---- What the verbs share -------------------------------------------------------------

Record = dict[str, Any]
RESEND_MS = 1000
VERSION_TRIES, VERSION_WAIT_MS = 3, 5000  # passed on at once so often; then after 250 ms, doubled up to this
SUSPECTS = ".suspects"  # after a queue's name: where its suspects wait


def lane_of(rec: Record) -> str:
    """Who ends this step: `queued` (or no lane) a worker, `due` the clock, `held` a person, `child` a run of its own.

    Entries of earlier versions have a kind alone, and its lane.
    """
    return str(rec.get("lane") or LANES_BEFORE.get(rec.get("kind", ""), "queued"))


def is_limited(rec: Record) -> bool:
    """Whether this step may be claimed only within the limits of its run; of earlier versions, an Ask."""
    return bool(rec.get("limited")) or (rec.get("kind") == "Ask" and not rec.get("lane"))


def is_in_doubt(rec: Record) -> bool:
    """Whether it is unknown if this at-most-once step happened: it is leased, or was cut off while it was."""
    return bool(rec.get("once") and (rec["st"] == "leased" or rec.get("lost") or rec.get("why") == "in_doubt"))


class Transaction:
    """Tables at one moment of the store's time; `sent` gathers (queue, head, seq, tail) to be published."""

    def __init__(self, tables: Tables, now: int) -> None:
        self.t, self.now = tables, now
        self.sent: list[tuple[str, str, int, str]] = []

    # ---- runs, records -------------------------------------------------------------------------
    def rec(self, run: str, key: str) -> Any:
        """A step's open record, its mark when it has ended (`E…`, `D…`), None when there is none."""
        value = self.t.hget(f"st:{run}", key)
        return dict(value) if isinstance(value, dict) else value

    def put(self, run: str, key: str, rec: Record) -> None:
        """Write a record."""
        self.t.hset(f"st:{run}", key, rec)

    def event(self, run: str, text: str) -> int:
        """Append an event; answers the journal's length."""
        return self.t.push(f"ev:{run}", f"{self.now} {text}")

    def is_open(self, run: str) -> bool:
        """Whether the run has not ended."""
        return bool(self.t.hget(f"run:{run}", "status") == "open")

    def is_cancelled(self, run: str) -> bool:
        """Whether the run or one above it was cancelled; a child's id begins with its parent's."""
        while run:
            if self.t.sismember("cancelled", run):
                return True
            run = run.rpartition("/")[0]
        return False

    def charge(self, run: str, usage: dict[str, float]) -> None:
        """Add to the totals of the run's tree."""
        root = run.partition("/")[0]
        for name, amount in usage.items():
            self.t.hincr(f"run:{root}", name, amount)

    # ---- entries -------------------------------------------------------------------------------
    def enqueue(self, unit: str, run: str, key: str, rec: Record) -> None:
        """Write the entry to the outbox, and send its message."""
        seq = int(self.t.hincr("meta", "seq"))
        queue, head, tail = self.t.hget("wires", unit).split("\0")
        if rec.get("room"):
            queue += SUSPECTS
        rec.update(st="queued", q=queue, rs=0, rt=self.now + RESEND_MS)
        rec.pop("why", None)
        self.put(run, key, rec)
        self.t.zadd(f"q:{queue}", unit, seq)
        self.t.sadd("queues", queue)
        self.sent.append((queue, head, seq, tail))

    def leave(self, unit: str, rec: Record) -> None:
        """Remove the entry from the index of its state."""
        st = rec["st"]
        if st == "queued":
            self.t.zrem(f"q:{rec['q']}", unit)
        elif st == "leased":
            self.t.zrem("leased", unit)
            self.t.srem(f"wl:{rec['w']}", unit)
            if rec.get("room") and not self.t.smembers(f"wl:{rec['w']}"):
                self.t.hdel("cell", rec["w"])
        elif st == "due":
            self.t.zrem("due", unit)
        elif st == "held":
            self.t.zrem("held", unit)
            self.held(unit, -1)

    def hold(self, unit: str, run: str, key: str, rec: Record, why: str) -> None:
        """Hold the entry until a person decides."""
        rec.update(st="held", why=why)
        self.put(run, key, rec)
        self.t.zadd("held", unit, self.now)
        self.held(unit, 1)

    def held(self, unit: str, by: int) -> None:
        """Count the tree's held entries: time in which there is one is not counted in its `seconds`."""
        root = f"run:{unit.split('|')[1].partition('/')[0]}"
        n = self.t.hincr(root, "held_n", by)
        if by > 0 and n == 1:
            self.t.hset(root, "held_since", self.now)
        elif by < 0 and n == 0:
            self.t.hincr(root, "held_ms", self.now - self.t.hget(root, "held_since"))

    def wait_until(self, unit: str, run: str, key: str, rec: Record, at: int) -> None:
        """Make the entry due at a time."""
        rec["st"] = "due"
        self.put(run, key, rec)
        self.t.zadd("due", unit, at)

    def give_back(self, unit: str, run: str, key: str, rec: Record, crashed: bool) -> None:
        """Queue an entry whose worker is gone; its fence stays valid until the next claim."""
        self.leave(unit, rec)
        rec["lost"] = 1
        self.enqueue(unit, run, key, rec)

    def advance(self, run: str) -> None:
        """Queue an advance of the run, unless one is queued."""
        rec = self.rec(run, "a")
        unit = f"a|{run}"
        if isinstance(rec, dict) and (rec["st"] in ("queued", "leased") or rec.get("why") == "quarantined"):
            return  # a leased one finds the journal longer than it read, and replays again
        if isinstance(rec, dict):
            self.leave(unit, rec)
        self.t.hset("wires", unit, self.t.hget(f"run:{run}", "wire"))
        self.enqueue(unit, run, "a", {"st": "new", "f": 0, "a": 0})

    def drop(self, unit: str, run: str, key: str, rec: Record, mark: str) -> None:
        """Remove the entry; `mark` replaces its record."""
        self.leave(unit, rec)
        mark = "D" if mark == "E0" and is_in_doubt(rec) else mark
        self.t.hdel("wires", unit)
        self.t.hset(f"st:{run}", key, mark)

    # ---- ends ----------------------------------------------------------------------------------
    def end_step(self, run: str, n: int, rec: Record, ok: bool, fence: int) -> None:
        """Remove the entry of step n, whose end is written; the end of a member is counted in its gather."""
        self.drop(f"s|{run}|{n}", run, str(n), rec, f"E{fence}")
        if rec["g"]:
            self.end_member(run, rec["g"], n, ok)

    def end_member(self, run: str, first: int, n: int, ok: bool) -> None:
        """Count the end of a member; the one that decides the gather closes it."""
        g = self.t.hget(f"ga:{run}", str(first))
        if g is None or g["closed"]:
            return
        g = dict(g)
        g["left"] -= 1
        g["ok"] += 1 if ok else 0
        self.t.push(f"ge:{run}|{first}", str(n))
        if g["next"] and g["next"] <= g["last"]:  # a gather with a window: start the next one
            nxt = g["next"]
            g["next"] += 1
            waiting = self.rec(run, str(nxt))
            if isinstance(waiting, dict) and waiting["st"] == "backlog":
                self.start_member(run, nxt, waiting)
        self.t.hset(f"ga:{run}", str(first), g)
        if g["everyone"]:
            if g["left"] == 0:
                self.close(run, first, g, "all")
        elif g["ok"] >= g["need"]:
            self.close(run, first, g, "all" if g["left"] == 0 else "need")
        elif g["ok"] + g["left"] < g["need"]:
            self.close(run, first, g, "impossible")

    def start_member(self, run: str, n: int, rec: Record) -> None:
        """Queue a member of the backlog; of a child, its first advance."""
        if lane_of(rec) == "child":
            rec["st"] = "child"
            self.put(run, str(n), rec)
            self.advance(f"{run}/{n}")
        else:
            self.enqueue(f"s|{run}|{n}", run, str(n), rec)

    def close(self, run: str, first: int, g: Record, why: str) -> None:
        """Write GatherClosed, which says what the flow sees of the gather, and queue its body."""
        g["closed"] = 1
        self.t.hset(f"ga:{run}", str(first), g)
        self.t.zrem("due", f"g|{run}|{first}")
        ended = ",".join(self.t.lists.pop(f"ge:{run}|{first}", ()))
        self.event(run, f'{{"e":"GatherClosed","first":{first},"members":[{ended}],"why":"{why}"}}')
        if g["left"] > 0:
            for n in range(first, g["last"] + 1):
                self.let_go(run, n)
        self.advance(run)

    def let_go(self, run: str, n: int) -> None:
        """Stop waiting for step n: one not begun is dropped, a child is cancelled, a running one may commit."""
        rec = self.rec(run, str(n))
        if not isinstance(rec, dict):
            return
        if rec["st"] == "child":
            self.t.sadd("cancelled", f"{run}/{n}")
        elif rec["st"] != "leased":
            if rec["st"] == "backlog" and lane_of(rec) == "child":
                self.t.sadd("cancelled", f"{run}/{n}")
            self.drop(f"s|{run}|{n}", run, str(n), rec, "E0")

    def end_run(self, run: str, status: str, text: str, up: str, up_ok: bool) -> None:
        """Write the run's end, and in the same transaction `up`, the end of its parent's step."""
        head = self.t.hashes[f"run:{run}"]
        self.event(run, text)
        head["status"], head["ended"] = status, self.now
        self.t.zrem("open", run)
        for key in sorted(self.t.hashes[f"st:{run}"], key=str):
            rec = self.rec(run, key)
            if isinstance(rec, dict):
                if rec.get("st") == "child":
                    self.t.sadd("cancelled", f"{run}/{key}")
                elif rec.get("st") != "leased" or key == "a":
                    self.drop(f"a|{run}" if key == "a" else f"s|{run}|{key}", run, key, rec, "E0")
        if head.get("parent"):
            self.end_delegate(head["parent"], head["n"], up, up_ok)
        else:
            self.t.zadd("forget", run, self.now)
        if head.get("finish"):
            self.t.hset("wires", f"f|{run}", head["finish"])
            self.enqueue(f"f|{run}", run, "f", {"st": "new", "f": 0, "a": 0})

    def end_delegate(self, run: str, n: int, up: str, ok: bool) -> None:
        """Write the end of a child as the end of its parent's step."""
        rec = self.rec(run, str(n))
        if not self.is_open(run) or not isinstance(rec, dict):
            return
        self.event(run, up)
        self.end_step(run, n, rec, ok, 0)
        if not rec["g"]:
            self.advance(run)
