"""Imports the events of an ended run into the journal of its retry.

Marks in `st:R`: `E…` a step that has ended · `D` an at-most-once step that was cut off with its run, so that it is unknown
whether it happened · `D:DIGEST` the same step in the retry, until it is planned there.
"""

from typing import Any

from agentmesh.journal.transaction import Record, Transaction, is_in_doubt


def import_events(s: Transaction, carried: dict[str, Any]) -> None:
    """Write a run's journal before the run is begun: events with their old times, and which steps need no planning."""
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
    """Whether an imported journal begins with this very event; another journal (the flow was changed) is deleted."""
    lines = s.t.lists.get(f"ev:{run}")
    if not lines:
        return False
    if lines[0].partition(" ")[2] == text:
        return True
    s.t.lists.pop(f"ev:{run}", None)
    s.t.hashes.pop(f"st:{run}", None)
    return False


def count_ended_members(s: Transaction, run: str, plans: list[dict[str, Any]], g: dict[str, Any]) -> None:
    """Count the imported members, which have ended, in a gather that is opened again."""
    if sum(p["n"] >= g["first"] for p in plans) == g["last"] - g["first"] + 1:
        return
    for n in range(g["first"], g["last"] + 1):
        if s.rec(run, str(n)) == "E0":
            s.end_member(run, g["first"], n, True)


def planned_state(mark: Any, p: dict[str, Any], rec: Record) -> str:
    """The state in which a step is planned, "" where the journal has it.

    One that was cut off is marked as in doubt, and is not approved a second time.
    """
    if mark is None:
        return str(p["state"])
    if not isinstance(mark, str) or not mark.startswith("D:"):
        return ""
    if p.get("once") and mark == f"D:{p.get('digest', '')}":
        rec["lost"] = 1
        return "queued" if p["state"] == "held" else str(p["state"])
    return str(p["state"])
