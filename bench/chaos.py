"""Runs of a nested crew under a seeded schedule of faults, counted by an oracle outside the system; beside plain Celery.

    python bench/chaos.py                     short: 150 runs
    python bench/chaos.py --full              the gate: 1,000 runs, 100 worker kills, 20 store kills; then 500 kills of
                                              at_most_once tools, and the loop over the k-th command
    python bench/chaos.py --faults workers,host,stop,store,messages,proxy --seed 7 --runs 300

A worker holds leases when it is struck: an LLM call that it held may be paid twice, no other. `resume` is the time from a
kill to the end of each step that was held then, its own work included.
"""

import argparse
import sys
from importlib.metadata import version
from typing import Any

from chaos_loops import kth, once
from chaos_oracle import Tally, quantile
from chaos_rows import mesh_row, plain_row
from common import machine

KINDS = ("workers", "store", "broker", "stop", "host", "messages", "proxy")
RESUME_S = {"worker": 2.0, "host": 12.0}  # p95


def main() -> None:
    """Print the table; exit 1 when agentmesh fails its gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help="1,000 runs, 100 worker kills, 20 store kills, and both loops"
    )
    parser.add_argument("--runs", type=int, default=150)
    parser.add_argument("--kills", type=int, default=0, help="go on until so many workers were killed")
    parser.add_argument("--store-kills", type=int, default=0, help="and the store so often")
    parser.add_argument("--seconds", type=float, default=0.0, help="and for so long at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", default="workers,store", help=f"of {','.join(KINDS)}")
    parser.add_argument(
        "--every", type=float, default=1.0, help="seconds between two worker kills; other faults are rarer"
    )
    parser.add_argument("--at-once", type=int, default=20, help="runs at a time")
    parser.add_argument("--broker", choices=["valkey", "rabbitmq"], default="valkey")
    parser.add_argument("--plain", action="store_true", help="plain Celery's row too")
    parser.add_argument("--kth", action="store_true", help="only the loop over the k-th command")
    parser.add_argument("--once", type=int, default=0, metavar="KILLS", help="only the loop of at_most_once tools")
    given = parser.parse_args()
    given.faults = given.faults.split(",")
    if unknown := set(given.faults) - set(KINDS):
        parser.error(f"unknown fault {sorted(unknown)[0]!r}; use one of: {', '.join(KINDS)}")
    if given.full:
        given.runs, given.kills, given.store_kills, given.plain = 1000, 100, 20, True
        given.once = given.once or 500
    names = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis"))
    print(
        f"seed {given.seed}; faults {','.join(given.faults)}; broker {given.broker}; {names}; {machine()}", flush=True
    )
    failed: list[str] = []
    if given.full or not (given.kth or given.once):
        failed += table(given)
    if given.full or given.kth:
        failed += kth(given)
    if given.once:
        failed += once(given)
    print("gate: " + ("; ".join(failed) if failed else "passed"))
    sys.exit(bool(failed))


def table(given: Any) -> list[str]:
    """Both rows; what agentmesh missed."""
    print(
        f"{'':10} {'runs':>5} {'lost':>5} {'hung':>5} {'double':>6} {'LLM again':>14} {'tools again':>14} {'wall s':>7}  struck"
    )
    tally, chaos = mesh_row(given)
    show("agentmesh", tally, chaos, excused=True)
    for fault, seconds in sorted(tally.resume_s.items()):
        p50, p95 = quantile(seconds, 0.5), quantile(seconds, 0.95)
        print(
            f"  resume after {fault}: p50 {p50:.2f} s, p95 {p95:.2f} s, most {max(seconds):.2f} s of {len(seconds)} units held"
        )
    for note in tally.notes[:10]:
        print(f"  {note}")
    if given.plain:
        plain, chaos = plain_row(given)
        show("celery", plain, chaos, excused=False)
        for note in plain.notes[:3]:
            print(f"  {note}")
    return misses(tally)


def show(name: str, tally: Tally, chaos: Any, *, excused: bool) -> None:
    """One line."""
    llm = f"{tally.llm_repeated} of {tally.llm_excused}" if excused else str(tally.llm_repeated)
    tools = f"{tally.tools_repeated} of {tally.tools_excused}" if excused else str(tally.tools_repeated)
    kinds: dict[str, int] = {}
    for struck in chaos.log:
        kinds[struck.fault] = kinds.get(struck.fault, 0) + 1
    print(f"{name:10} {tally.runs:5} {tally.lost:5} {tally.hung:5} {tally.double:6} {llm:>14} {tools:>14} {tally.wall_s:7.0f}  "
          + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())), flush=True)  # fmt: skip


def misses(tally: Tally) -> list[str]:
    """What the gate asks for and was not there."""
    found = [
        f"{n} {what}" for n, what in ((tally.lost, "lost"), (tally.hung, "hung"), (tally.double, "ended twice")) if n
    ]
    if tally.llm_repeated > tally.llm_excused:
        found.append(f"{tally.llm_repeated} LLM calls repeated, {tally.llm_excused} were held")
    for fault, most_s in RESUME_S.items():
        if (p95 := quantile(tally.resume_s.get(fault, []), 0.95)) > most_s:
            found.append(f"resume after {fault} p95 {p95:.2f} s > {most_s} s")
    return found


if __name__ == "__main__":
    main()
