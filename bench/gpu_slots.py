"""What stands around an engine, with slots and a clock in its place: one device worker, two of them, and what a request costs.

    python bench/gpu_slots.py [--slots 256] [--requests 1536] [--plumbing 2000]

An engine of 256 slots whose step takes 50 ms; an answer has 20 to 60 tokens by its name. `busy` is the part of all slots that
were taken, from the first step until nothing is left to fill them with. Plumbing is the CPU of the device's worker for a request
of one token, beside the same worker whose model answers at once.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import cpu_s, machine, median, valkey

from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.supervisor import Supervisor

CREW = str(Path(__file__).parent / "gpu_slots_crew.py")


@contextmanager
def working(store: Any, workers: int, **settings: object) -> Iterator[tuple[Mesh, list[int], list[int]]]:
    """A mesh, the pids of its device workers and of the others; the settings go to the crew's file."""
    named = {f"BENCH_{k.upper()}": str(v) for k, v in settings.items()}
    config, crew = Config(broker=store.broker_url, journal=store.url), load_crew(CREW)
    first, device = worker_commands(config, {CREW: crew})
    supervisor = Supervisor([first, *[device] * workers], env={**named, "OMP_NUM_THREADS": "1"})
    supervisor.start()
    mesh = Mesh(crew, config=config)
    try:
        assert supervisor.wait_ready(120)
        pids = list(supervisor.pids.values())
        mesh.run(crew.lead, 8, timeout_s=60)
        yield mesh, pids[1:], pids[:1]
    finally:
        supervisor.stop(now=True)
        supervisor.join(10)
        mesh.close()


def utilisation(notes: Path, slots: int, workers: int, since_s: float) -> float:
    """The part of all slots of all workers that were taken, until they only emptied."""
    rows = [[r for line in f.open() if (r := json.loads(line))[0] > since_s] for f in notes.iterdir()]
    last = [max((i for i, r in enumerate(one) if r[1] >= max(x[1] for x in one) * 0.9), default=0) for one in rows]
    begins, until = min(one[0][0] for one in rows), max(one[i][0] for one, i in zip(rows, last, strict=True))
    taken = 0.0
    for one in rows:
        for before, after in itertools.pairwise(one):
            taken += after[1] * (after[0] - before[0]) if after[0] <= until else 0.0
    return taken / ((until - begins) * slots * workers)


def filled(store: Any, workers: int, slots: int, requests: int) -> tuple[float, float]:
    """Requests a second and the busy part."""
    with tempfile.TemporaryDirectory() as notes:
        with working(store, workers, notes=notes, slots=slots) as (mesh, _, _):
            began = time.monotonic()
            runs = [mesh.start(mesh.crew.lead, requests // 4) for _ in range(4)]
            assert [r.result(timeout_s=600) for r in runs] == [requests // 4] * 4
            took = time.monotonic() - began
        return requests / took, utilisation(Path(notes), slots, workers, began)


def plumbing(store: Any, requests: int) -> dict[str, tuple[float, float]]:
    """CPU ms a request, of the device's worker and of the other, by the kind of model; of three turns the median."""
    found: dict[str, tuple[float, float]] = {}
    ways: dict[str, dict[str, object]] = {"at once": {"instant": 1}, "engine": {}}
    for name, more in ways.items():
        with working(store, 1, step_s=0.01, spread=0, new_tokens=1, **more) as (mesh, devices, others):
            turns = []
            for _ in range(3):
                before = sum(map(cpu_s, devices)), sum(map(cpu_s, others))
                mesh.run(mesh.crew.lead, requests, timeout_s=300)
                turns.append((sum(map(cpu_s, devices)) - before[0], sum(map(cpu_s, others)) - before[1]))
            found[name] = tuple(1e3 * median([t[i] for t in turns]) / requests for i in (0, 1))  # type: ignore[assignment]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--requests", type=int, default=1536, help="for each worker")
    parser.add_argument("--plumbing", type=int, default=2000)
    given = parser.parse_args()
    print(machine(), flush=True)
    with valkey() as store:
        one, busy = filled(store, 1, given.slots, given.requests)
        print(f"1 worker    {one:6.1f} requests/s   {busy:.0%} busy", flush=True)
        two, busy = filled(store, 2, given.slots, 2 * given.requests)
        print(f"2 workers   {two:6.1f} requests/s   {busy:.0%} busy   {two / one:.2f} x one", flush=True)
        cost = plumbing(store, given.plumbing)
    for name, (device, other) in cost.items():
        print(f"{name:<10}  {device:.2f} ms CPU a request in the device's worker, {other:.2f} in the other")
    print(f"plumbing    {cost['engine'][0] - cost['at once'][0]:.2f} ms CPU a request")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
