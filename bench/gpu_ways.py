"""Three ways to answer so many prompts, each ready to go: the bare engine, agent steps through Celery, the usual pattern.

The usual pattern is a solo Celery worker with the model loaded, all threads, one task and one `generate` a prompt.
BENCH_MODEL and BENCH_NEW_TOKENS say what is asked, BENCH_MEMORY which part of a GPU an engine may take.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery
from common import cpu_s, valkey
from gpu_crew import MEMORY, MODEL, NEW_TOKENS, prompt

from agentmesh.celery.event_loop import run_sync
from agentmesh.config import Config
from agentmesh.inference.request import InferenceRequest
from agentmesh.journal.events import RunStarted, StepDone
from agentmesh.mesh import Mesh
from agentmesh.message import user
from agentmesh.model import Prompt
from agentmesh.models.local import LocalModel, encode_prompt
from agentmesh.runtime.crew_file import load_crew
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.supervisor import Supervisor

HERE = Path(__file__).parent
CREW = str(HERE / "gpu_crew.py")
LOAD_S = 240


class Took(NamedTuple):
    """One turn of one way. Seconds since all were asked: until the last answer, each answer, each first token."""

    wall_s: float
    ends_s: list[float]
    firsts_s: list[float]


@dataclass
class Ways:
    """Each of `ways` answers so many prompts, in a turn that has prompts of its own. `pids` are those that compute."""

    engine: Any
    ways: dict[str, Callable[[int, int], Took]] = field(default_factory=dict)
    pids: dict[str, list[int]] = field(default_factory=dict)
    streamed: Callable[[int, int], Took] | None = None

    def costed(self, name: str, steps: int, turn: int) -> tuple[Took, float]:
        """A turn, and the CPU seconds of its processes."""
        before = sum(map(cpu_s, self.pids[name]))
        took = self.ways[name](steps, turn)
        return took, sum(map(cpu_s, self.pids[name])) - before


@contextmanager
def usual_worker(url: str) -> Iterator[Any]:
    """The usual worker, ready; what sends it a prompt."""
    os.environ["BENCH_BROKER"] = url
    client = Celery("client", broker=url, backend=url)

    def ask(text: str) -> Any:
        return client.send_task("usual.ask", (text,), queue="usual")

    argv = [sys.executable, "-m", "celery", "-A", "gpu_usual", "worker", "-P", "solo", "-Q", "usual", "-l", "error"]
    process = subprocess.Popen(argv, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ask("warm up").get(timeout=LOAD_S)
        yield ask, process.pid
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def three_ways() -> Iterator[Ways]:
    """All three, loaded and warm."""
    local = LocalModel(MODEL)
    engine = local.prepare(requests=256, memory=MEMORY)
    loaded = local.load()

    def bare(steps: int, turn: int) -> Took:
        ids = [tuple(encode_prompt(loaded, Prompt(MODEL, [user(prompt(i, turn))]))) for i in range(steps)]
        began, ends = time.perf_counter(), list[float]()
        futures = [engine.submit(InferenceRequest(t, NEW_TOKENS)) for t in ids]
        for future in futures:
            future.add_done_callback(lambda _: ends.append(time.perf_counter() - began))
        for future in futures:
            assert len(future.result(600).tokens) == NEW_TOKENS
        return Took(time.perf_counter() - began, ends, [])

    with valkey() as server, usual_worker(server.broker_url) as (ask, usual_pid):
        config, crew = Config(broker=server.broker_url, journal=server.url), load_crew(CREW)
        mesh, supervisor = Mesh(crew, config=config), Supervisor(worker_commands(config, {CREW: crew}))
        supervisor.start()
        assert supervisor.wait_ready(LOAD_S)

        def celery(steps: int, turn: int, *, stream: bool = False) -> Took:
            began = time.perf_counter()
            run = mesh.start(crew.lead, [steps, turn], stream=stream)
            firsts = run_sync(_first_tokens(run.aio.live(), began)) if stream else []
            run.result(timeout_s=600)
            wall, events = time.perf_counter() - began, run.events()
            (at_ms,) = [e.at_ms for e in events if isinstance(e, RunStarted)]
            return Took(wall, [(e.at_ms - at_ms) / 1000 for e in events if isinstance(e, StepDone)], firsts)

        def usual(steps: int, turn: int) -> Took:
            began, ends = time.perf_counter(), list[float]()
            for result in [ask(prompt(i, turn)) for i in range(steps)]:
                result.get(timeout=600)
                ends.append(time.perf_counter() - began)
            return Took(ends[-1], ends, ends)  # nothing is streamed: the first token comes with the last

        celery(2, 10_000)
        ways = {"bare": bare, "celery": celery, "usual": usual}
        pids = {"bare": [os.getpid()], "celery": list(supervisor.pids.values()), "usual": [usual_pid]}
        try:
            yield Ways(engine, ways, pids, lambda steps, turn: celery(steps, turn, stream=True))
        finally:
            supervisor.stop(now=True)
            supervisor.join(10)
            mesh.close()
            engine.close()


async def _first_tokens(live: Any, began: float) -> list[float]:
    """When each step's first token came."""
    firsts: dict[int, float] = {}
    async for token in live:
        if token.kind == "text":
            firsts.setdefault(token.n, time.perf_counter() - began)
    return list(firsts.values())


def compared(ways: Ways, steps: int, turns: int, usual: int, *, first_turn: int = 0) -> dict[str, float]:
    """Print the table of so many steps; the best turn's tokens a second of each way. The ways take turns."""
    took: dict[str, list[tuple[Took, float]]] = {name: [] for name in ways.ways if usual or name != "usual"}
    for turn in range(first_turn, first_turn + turns):
        for name in list(took) if turn % 2 == 0 else list(took)[::-1]:
            took[name].append(ways.costed(name, usual if name == "usual" else steps, turn))
    counts = {n: (usual if n == "usual" else steps) for n in took}
    best = {n: min((t for t, _ in all_of), key=lambda t: t.wall_s) for n, all_of in took.items()}
    rates = {n: counts[n] * NEW_TOKENS / t.wall_s for n, t in best.items()}
    cost = {n: 1000 * min(c for _, c in took[n]) / counts[n] / NEW_TOKENS for n in took}
    beside = {
        "bare": "",
        "celery": f"   {rates['celery'] / rates['bare']:.0%} of the bare engine",
        "usual": f"   through Celery is {rates['celery'] / rates['usual']:.1f} x" if usual else "",
    }
    for name, label in {"bare": "bare engine", "celery": "through Celery", "usual": "the usual way"}.items():
        if name in took:
            print(f"{label:<16} {counts[name]:4d} steps {rates[name]:8.1f} new tokens/s{beside[name]}", flush=True)
    for name in took:
        print(f"  {name:<7} answers after {spread(best[name].ends_s)} · {cost[name]:.2f} ms of CPU a token")
    if ways.streamed is not None:
        told = ways.streamed(steps, first_turn + turns)
        print(f"  streamed: first tokens after {spread(told.firsts_s)}, of {len(told.firsts_s)} steps")
    walls = (f"{n} {' '.join(f'{t.wall_s:.1f}' for t, _ in all_of)}" for n, all_of in took.items())
    print("  every turn, s: " + " · ".join(walls), flush=True)
    return rates


def spread(values: list[float]) -> str:
    """The middle, and what one in twenty is beyond."""
    if not values:
        return "-"
    p95 = sorted(values)[min(len(values) - 1, int(len(values) * 0.95))]
    return f"p50 {statistics.median(values):.2f} s, p95 {p95:.2f} s"
