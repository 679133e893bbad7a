"""Two loops: the store's link cut after the k-th command and the worker killed; tools that may run once, and many kills."""

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import redis
from chaos_oracle import Oracle, answer, expected, repeats

from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.registry import runtime_of
from agentmesh.config import Config
from agentmesh.journal.events import StepDone, StepInDoubt
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeOpenAI, Proxy, ValkeyServer, WorkerProcess
from agentmesh.testing.servers import running_server

CREW = str(Path(__file__).parent / "chaos_crew.py")
MOST_K = 400
AT_ONCE = 8  # runs of payers


class Bench:
    """A store, the oracle, a mesh for the client."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.store: ValkeyServer = stack.enter_context(running_server(ValkeyServer))
        self.server = stack.enter_context(FakeOpenAI(answer))
        self.log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))) / "log"
        self.log.touch()
        self.env = {"OPENAI_BASE_URL": self.server.url, "OPENAI_API_KEY": "k", "CHAOS_LOG": str(self.log)}
        self.config = Config(broker=self.store.broker_url, journal=self.store.url)
        self.mesh = Mesh(load_crew(CREW), config=self.config)
        stack.callback(self.mesh.close)
        self.oracle = Oracle(self.store.url, self.server, self.log)

    def worker(self, config: Config | None = None) -> WorkerProcess:
        """Ready."""
        return WorkerProcess(CREW, config or self.config, env=self.env).start()

    def give_back(self, worker: WorkerProcess) -> None:
        """As its supervisor would."""
        crew = self.mesh.crew
        journal = runtime_of(self.mesh.app, crew.name).journal
        run_sync(journal.release(worker.name, crashed=True, queues=crew.queues.broker_names()))


def kth(given: argparse.Namespace) -> list[str]:
    """k = 1, 2, … until a run passes clean: the reply to the k-th command is lost, or the command itself."""
    failed: list[str] = []
    for lose in ("reply", "command"):
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            bench = Bench(stack)
            proxy = stack.enter_context(Proxy(bench.store.url))
            for k in range(1, MOST_K):
                wrong, cut = _cut_at(bench, proxy, k, lose)
                failed += [f"k={k} ({lose}): {w}" for w in wrong]
                if not cut:
                    break
                if k % 20 == 0:
                    print(f"  k={k}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            else:
                failed.append(f"no clean run until k={MOST_K}")
        print(
            f"k-th command, its {lose} lost, then SIGKILL: clean at k={k}, {len(failed)} wrong, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return failed


def _cut_at(bench: Bench, proxy: Proxy, k: int, lose: Any) -> tuple[list[str], bool]:
    task, cut = f"k{lose[0]}{k}", threading.Event()
    seen = Config(broker=proxy.url, journal=proxy.url)
    worker = bench.worker(seen)
    asked_before = len(bench.server.requests)

    def killed() -> None:
        worker.kill()
        cut.set()

    proxy.cut_after(k, lose=lose, then=killed)
    run = bench.mesh.start(bench.mesh.crew.agent("Lead"), task, run_id=task)
    while not cut.wait(0.005) and run.head().status == "open":
        pass
    excused = 0
    if cut.is_set():
        worker.join()
        bench.oracle.struck.clear()
        bench.oracle.victim("cut")(worker.name, worker.pid)
        excused = sum(s.kind == "Ask" for s in bench.oracle.struck)
        bench.give_back(worker)
        after = bench.worker()
    wrong = []
    try:
        if (got := run.result(timeout_s=30)) != expected(task):
            wrong.append(f"result {got!r}")
    except Exception as e:
        wrong.append(repr(e))
    for member in bench.mesh.get(task).tree():
        if repeats(Counter(e.n for e in member.events() if isinstance(e, StepDone))):
            wrong.append(f"a step of {member} ended twice")
    again = repeats(Counter(json.dumps(r.body["messages"]) for r in bench.server.requests[asked_before:]))
    if again > excused:
        wrong.append(f"{again} LLM calls again, {excused} were held")
    was_cut = cut.is_set()
    proxy.heal()
    for one in (after, worker) if was_cut else (worker,):
        one.kill()
        one.join()
    return wrong, was_cut


def once(given: argparse.Namespace) -> list[str]:
    """Runs of at_most_once tools while workers are killed; a person says `done` to what is in doubt."""
    rng, began = random.Random(given.seed), time.monotonic()
    with contextlib.ExitStack() as stack:
        bench = Bench(stack)
        payer = bench.mesh.crew.agent("Payer")
        runs: list[Any] = []
        over = threading.Event()
        clerk = threading.Thread(target=_resolve, args=(bench, runs, over), daemon=True)
        clerk.start()
        store = redis.Redis.from_url(bench.store.url)
        workers = [bench.worker(), bench.worker()]
        held = 0
        for kill in range(given.once):
            while len([r for r in runs[-2 * AT_ONCE :] if r.head().status == "open"]) < AT_ONCE:
                runs.append(bench.mesh.start(payer, f"p{len(runs)}", run_id=f"p{len(runs)}"))
            victim = workers[kill % 2]
            until = time.monotonic() + 5
            while not store.scard(f"agentmesh:wl:{victim.name}") and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.04))
            victim.kill()
            victim.join()
            held += bool(store.scard(f"agentmesh:wl:{victim.name}"))
            bench.give_back(victim)
            workers[kill % 2] = bench.worker()
            if kill % 50 == 49:
                print(f"  {kill + 1} kills, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        hung = 0
        for run in runs:
            try:
                run.result(timeout_s=30)
            except TimeoutError:
                hung += 1
        over.set()
        clerk.join()
        for worker in workers:
            worker.kill()
            worker.join()
        store.close()
        doubts = sum(isinstance(e, StepInDoubt) for r in runs for e in r.events())
        done = Counter(bench.log.read_text().split())
        print(f"at_most_once: {given.once} kills ({held} with work in flight), {len(runs)} runs, {sum(done.values())} executions, "
              f"{doubts} in doubt, {repeats(done)} executed twice, {hung} hung, {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    return [f"{repeats(done)} at_most_once tools twice, {hung} hung"] if repeats(done) or hung else []


def _resolve(bench: Bench, runs: list[Any], over: threading.Event) -> None:
    ended: set[str] = set()
    while not over.wait(0.05):
        for run in list(runs):
            if run.run_id in ended:
                continue
            if run.head().status != "open":
                ended.add(run.run_id)
                continue
            for item in run.waiting_for():
                with contextlib.suppress(Exception):  # it moved on
                    run.resolve(item, "done", value="as a person says", by="clerk")
