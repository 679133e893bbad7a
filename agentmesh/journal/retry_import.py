"""Carrying the facts of an ended run into the journal of the run that takes it up again.

Marks in `st:R`: `E…` a step that has ended · `D` an at-most-once step that was cut off with its run, so that nobody
knows whether it happened · `D:DIGEST` the same step as the new run knows it, until it is planned anew.
"""

from typing import Any

from agentmesh.journal.transaction import Record, Transaction, is_in_doubt


def import_events(s: Transaction, carried: dict[str, Any]) -> None:
    """A run's journal before the run is begun: facts with their old times, and which steps need no planning."""
    run = carried["run"]
    for fact in carried["events"]:
        s.t.push(f"ev:{run}", f"{fact['at']} {fact['event']}")
    for n in carried["kept"]:
        s.t.hset(f"st:{run}", str(n), "E0")
    for n, digest in carried["cut"]:
        old = s.rec(carried["from"], str(n))
        if old == "D" or (isinstance(old, dict) and is_in_doubt(old)):
            s.t.hset(f"st:{run}", str(n), f"D:{digest}")
    s.t.sadd(f"tree:{run.partition('/')[0]}", run)


def is_same_start(s: Transaction, run: str, text: str) -> bool:
    """Whether a carried journal begins with this very fact; another one (a flow that was mended) is thrown away."""
    lines = s.t.lists.get(f"ev:{run}")
    if not lines:
        return False
    if lines[0].partition(" ")[2] == text:
        return True
    s.t.lists.pop(f"ev:{run}", None)
    s.t.hashes.pop(f"st:{run}", None)
    return False


def settle_reopened_gather(s: Transaction, run: str, plans: list[dict[str, Any]], g: dict[str, Any]) -> None:
    """A gather that is opened again: the members carried here have ended, and are not waited for."""
    if sum(p["n"] >= g["first"] for p in plans) == g["last"] - g["first"] + 1:
        return
    for n in range(g["first"], g["last"] + 1):
        if s.rec(run, str(n)) == "E0":
            s.strike(run, g["first"], n, True)


def planned_state(known: Any, p: dict[str, Any], rec: Record) -> str:
    """The state a step is planned in, "" where the journal has it; one that was cut off is marked, and asks no yes again."""
    if known is None:
        return str(p["state"])
    if not isinstance(known, str) or not known.startswith("D:"):
        return ""
    if p.get("once") and known == f"D:{p.get('digest', '')}":
        rec["lost"] = 1
        return "queued" if p["state"] == "held" else str(p["state"])
    return str(p["state"])
