"""Agent steps on a local model: through Celery, beside the bare engine on the same prompts, and beside the usual pattern.

    python bench/gpu_batch.py [--steps 32] [--turns 3] [--usual 4]

Every turn has prompts of its own, so that no way finds an earlier turn's in its cache; the ways take turns, and of each
the fastest turn counts. Every answer has the same number of tokens. The usual pattern is a solo worker with the model
loaded, all threads, one task and one `generate` a prompt.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from common import cpu_s, machine, valkey

HERE = Path(__file__).parent


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
        ask("warm up").get(timeout=120)
        yield ask, process.pid
    finally:
        process.terminate()
        process.wait(20)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--usual", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    given = parser.parse_args()
    os.environ["BENCH_NEW_TOKENS"] = str(given.new_tokens)
    from gpu_crew import MODEL, prompt

    from agentmesh.boot import load_crew
    from agentmesh.celery.supervise import Supervisor
    from agentmesh.cli.child import specs_of
    from agentmesh.config import Config
    from agentmesh.gpu.request import Request
    from agentmesh.mesh import Mesh
    from agentmesh.message import user
    from agentmesh.models.local import LocalModel, encoded
    from agentmesh.ports import Prompt

    local = LocalModel(MODEL)
    engine = local.prepare(requests=256)
    loaded = local.load()
    device = str(engine._model.device)
    print(f"{given.steps} agent steps of {given.new_tokens} new tokens on {MODEL}, {device}; {machine()}")

    def bare(turn: int) -> float:
        ids = [tuple(encoded(loaded, Prompt(MODEL, [user(prompt(i, turn))]))) for i in range(given.steps)]
        began = time.perf_counter()
        for future in [engine.submit(Request(t, given.new_tokens)) for t in ids]:
            assert len(future.result(600).tokens) == given.new_tokens
        return time.perf_counter() - began

    with valkey() as server, usual_worker(server.broker_url) as (ask, usual_pid):
        config, crew = Config(broker=server.broker_url, journal=server.url), load_crew(str(HERE / "gpu_crew.py"))
        mesh = Mesh(crew, config=config)
        supervisor = Supervisor(specs_of(config, {str(HERE / "gpu_crew.py"): crew}))
        supervisor.start()
        assert supervisor.wait_ready(120)
        mesh.run(crew.lead, [2, 10_000], timeout_s=120)
        walls: dict[str, list[float]] = {"bare": [], "celery": [], "usual": []}
        cpus: dict[str, list[float]] = {"bare": [], "celery": [], "usual": []}
        pids = {"bare": [os.getpid()], "celery": list(supervisor.pids.values()), "usual": [usual_pid]}

        def celery(turn: int) -> float:
            began = time.perf_counter()
            mesh.run(crew.lead, [given.steps, turn], timeout_s=600)
            return time.perf_counter() - began

        def usual(turn: int) -> float:
            began = time.perf_counter()
            sent = [ask(prompt(i, turn)) for i in range(given.usual)]
            for result in sent:
                result.get(timeout=600)
            return time.perf_counter() - began

        for turn in range(given.turns):
            ways = [("bare", bare), ("celery", celery), ("usual", usual)]
            for name, way in ways if turn % 2 == 0 else ways[::-1]:
                before = sum(map(cpu_s, pids[name]))
                walls[name].append(way(turn))
                cpus[name].append(sum(map(cpu_s, pids[name])) - before)
        supervisor.stop(now=True)
        supervisor.join(10)
        mesh.close()
    engine.close()
    tokens = {n: (given.usual if n == "usual" else given.steps) * given.new_tokens for n in walls}
    cost_ms = {n: 1000 * min(c) / tokens[n] for n, c in cpus.items()}
    rates = {n: tokens[n] / min(w) for n, w in walls.items()}
    print(f"bare engine      {rates['bare']:7.1f} new tokens/s")
    print(
        f"through Celery   {rates['celery']:7.1f} new tokens/s   {rates['celery'] / rates['bare']:.0%} of the bare engine"
    )
    print(
        f"the usual way    {rates['usual']:7.1f} new tokens/s   through Celery is {rates['celery'] / rates['usual']:.1f} x"
    )
    print(
        f"CPU ms a token: bare {cost_ms['bare']:.2f} · through Celery {cost_ms['celery']:.2f} · usual {cost_ms['usual']:.1f}"
    )
    print("every turn, s: " + " · ".join(f"{n} {' '.join(f'{x:.1f}' for x in w)}" for n, w in walls.items()))


if __name__ == "__main__":
    main()
