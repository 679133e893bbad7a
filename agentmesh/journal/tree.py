"""A run's whole tree read at once: its open entries, and the new events of many runs.

Pure functions of the store. `lua/open_entries.lua` and `lua/new_events.lua` do the same, a slice for each call; a
differential test compares them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from agentmesh.journal.codec import decode_event
from agentmesh.journal.events import StepPlanned
from agentmesh.journal.transaction import Tables
from agentmesh.journal.types import OpenEntries, WaitingEntry

# A StepPlanned event as it is written, or the reference to its blob where it is large.
PLAN = re.compile(r'\d+ \{\s*"e":\s*"StepPlanned",\s*(?:"blob":"[0-9a-f]+",)?"n":\s*(\d+)')
WaitingLine = tuple[str, str, str, str]  # run, key, why, the line that planned the step or ""


def open_entries(t: Tables, run: str) -> tuple[int, list[WaitingLine]]:
    """How many entries of the tree are moving, and the waiting ones with the lines that planned their steps."""
    moving, waiting, todo = 0, list[WaitingLine](), [run]
    while todo:
        member = todo.pop()
        plans: dict[str, str] | None = None
        for key, record in t.hashes[f"st:{member}"].items():
            if not isinstance(record, dict):
                continue  # the mark of an ended step
            state, why = record["st"], record.get("why")
            if state == "child":
                todo.append(f"{member}/{key}")
            elif why and state in ("held", "due"):
                plans = planned_lines(t.lists[f"ev:{member}"]) if plans is None else plans
                waiting.append((member, key, why, plans.get(key, "")))
            elif not why and state in ("queued", "leased", "due"):
                moving += 1
    return moving, sorted(waiting)


def planned_lines(lines: Iterable[str]) -> dict[str, str]:
    """The newest line that planned each step, by the step's number."""
    return {match[1]: line for line in lines if (match := PLAN.match(line))}


def new_events(t: Tables, versions: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
    """The lines of each run after its known version; all lines of a run that has fewer, since it was begun anew."""
    for run, version in versions.items():
        after = version if version <= t.length(f"ev:{run}") else 0
        if lines := t.tail(f"ev:{run}", after):
            yield run, lines


def entries_from_lines(moving: int, waiting: Iterable[WaitingLine]) -> OpenEntries:
    """Decode the entries, in the order of runs and steps."""
    entries = []
    for run, key, why, line in waiting:
        plan = decode_event(line) if line else None
        step = plan if isinstance(plan, StepPlanned) else StepPlanned(n=0, kind="", name="")
        entries.append(WaitingEntry(run, key, why, step.name, step.detail))
    return OpenEntries(moving, sorted(entries, key=_place))


def _place(entry: WaitingEntry) -> tuple[str, list[int], int]:
    root, *below = entry.run_id.split("/")
    return root, [int(n) for n in below], int(entry.key) if entry.key.isdigit() else 0
