"""Reads of a run's whole tree from Redis: one script call for each slice, so that a large tree does not block the server."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from agentmesh.journal.tree import WaitingLine, planned_lines

RECORDS_PER_CALL, LINES_PER_CALL, BYTES_PER_CALL = 1_000, 1_000, 4 << 20  # 1 to 5 ms of the server
SEARCHED_LINES = 500  # of a run, searched for the plans of the steps that it waits for
RUNS_PER_CALL = 1_000
Evaluate = Callable[..., Awaitable[Any]]  # calls a script by its name with arguments


async def read_open_entries(evaluate: Evaluate, run_id: str) -> tuple[int, list[WaitingLine]]:
    """As `tree.open_entries`; lines may be missing, see `fill_missing_plans`.

    Where the tree changes between two slices, an entry may be missed, and a moving one may be counted twice.
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
    """The entries with the lines that the script did not reach: of steps that a long run planned long ago."""
    plans: dict[str, dict[str, str]] = {}
    for run, key, _, line in waiting:
        if not line and key.isdigit() and run not in plans:
            plans[run] = planned_lines(await lines_of(run))
    return [(run, key, why, line or plans.get(run, {}).get(key, "")) for run, key, why, line in waiting]


async def read_new_events(
    evaluate: Evaluate, versions: Mapping[str, int]
) -> AsyncIterator[list[tuple[str, list[str]]]]:
    """As `tree.new_events`, a slice at a time; a run with more lines than fit is continued in the next slice."""
    todo = list(versions.items())
    while todo:
        pairs, todo = todo[:RUNS_PER_CALL], todo[RUNS_PER_CALL:]
        arguments = [argument for pair in pairs for argument in pair]
        done, *texts = await evaluate("new_events", LINES_PER_CALL, BYTES_PER_CALL, *arguments)
        runs, rest = list[tuple[str, list[str]]](), list[tuple[str, int]]()
        at = 0
        while at < len(texts):
            run, first, more, count = texts[at : at + 4]
            runs.append((run, texts[at + 4 : at + 4 + count]))
            if more:
                rest.append((run, int(first) + count))
            at += 4 + count
        todo = rest + pairs[done:] + todo
        if runs:
            yield runs


def _groups(texts: list[str], size: int) -> list[tuple[Any, ...]]:
    return list(zip(*[iter(texts)] * size, strict=True))
