"""Reads of a run's whole tree from Redis: a script a slice, so that a large tree never blocks the server for long."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from agentmesh.journal.tree import WaitingLine, planned_lines

RECORDS_PER_CALL, LINES_PER_CALL, BYTES_PER_CALL = 1_000, 1_000, 4 << 20  # one to five milliseconds of the server
SEARCHED_LINES = 500  # of a run, for the plans of the steps it waits for
RUNS_PER_CALL = 1_000
Evaluate = Callable[..., Awaitable[Any]]  # of a script's name and its arguments, its answer


async def read_open_entries(evaluate: Evaluate, run_id: str) -> tuple[int, list[WaitingLine]]:
    """As `tree.open_entries`; lines may be missing, see `fill_missing_plans`.

    Where the tree changes between two slices an entry may be seen in neither, and one that moves in both.
    """
    todo, total, waiting = [run_id, "0"], 0, dict[tuple[str, str], WaitingLine]()
    while todo:
        moving, left, *texts = await evaluate("open_entries", RECORDS_PER_CALL, SEARCHED_LINES, *todo)
        todo, total = texts[:left], total + moving
        for run, key, why, line in _groups(texts[left:], 4):
            waiting[run, key] = (run, key, why, line)
    return total, sorted(waiting.values())


async def fill_missing_plans(
    waiting: list[WaitingLine], lines_of: Callable[[str], Awaitable[list[str]]]
) -> list[WaitingLine]:
    """The entries with the lines that the script did not reach: steps that a long run planned long ago."""
    plans: dict[str, dict[str, str]] = {}
    for run, key, _, line in waiting:
        if not line and key.isdigit() and run not in plans:
            plans[run] = planned_lines(await lines_of(run))
    return [(run, key, why, line or plans.get(run, {}).get(key, "")) for run, key, why, line in waiting]


async def read_new_events(evaluate: Evaluate, known: Mapping[str, int]) -> AsyncIterator[list[tuple[str, list[str]]]]:
    """As `tree.new_events`, a slice at a time; a run that has more lines than fit comes again in the next one."""
    todo = list(known.items())
    while todo:
        asked, todo = todo[:RUNS_PER_CALL], todo[RUNS_PER_CALL:]
        arguments = [argument for pair in asked for argument in pair]
        done, *texts = await evaluate("new_events", LINES_PER_CALL, BYTES_PER_CALL, *arguments)
        found, rest = list[tuple[str, list[str]]](), list[tuple[str, int]]()
        at = 0
        while at < len(texts):
            run, first, more, count = texts[at : at + 4]
            found.append((run, texts[at + 4 : at + 4 + count]))
            if more:
                rest.append((run, int(first) + count))
            at += 4 + count
        todo = rest + asked[done:] + todo
        if found:
            yield found


def _groups(texts: list[str], size: int) -> list[tuple[Any, ...]]:
    return list(zip(*[iter(texts)] * size, strict=True))
