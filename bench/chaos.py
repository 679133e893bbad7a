"""Runs of a nested crew under a seeded schedule of faults, counted by an oracle outside: the fake LLM server and a file.

    python bench/chaos.py [--runs 60] [--seed 1] [--faults workers,store] [--full]

--full is 1,000 runs, about five minutes. Exit code 1 when a promise was broken.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import redis
from common import machine

from agentmesh.boot import load_crew
from agentmesh.celery.loop import drive
from agentmesh.config import Config
from agentmesh.errors import MeshError
from agentmesh.event import GatherClosed, StepDone, StepFailed
from agentmesh.mesh import Mesh
from agentmesh.testing import Chaos, FakeOpenAI, Host, KillHost, KillServer, KillWorker, StopWorker, says, uses
from agentmesh.testing.servers import ValkeyServer, a_server

CREW = str(Path(__file__).parent / "chaos_crew.py")
CALLS = 10  # LLM calls of a run
PATIENCE_S = 60.0


def answer(body: dict[str, Any]) -> Any:
    """What the agents are told."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return says(f"<{last['content']}>")
    return uses("look_up", word=last["content"]) if body.get("tools") else says(f"[{last['content']}]")


def expected(task: str) -> str:
    """The one right end."""
    return f"[[plan {task}] | {' | '.join(f'<meaning of {task}-{i}>' for i in range(4))}]"


class Oracle:
    """Counts from outside, and what each struck worker held at that moment."""

    def __init__(self, mesh: Mesh, store: ValkeyServer, server: FakeOpenAI, log: Path) -> None:
        self.mesh, self.store, self.server, self.log = mesh, store, server, log
        self.held = 0  # leases of struck workers: the calls that may be repeated are among them
        self.unread = 0

    def victim(self, name: str, pid: int) -> None:
        """Note what it holds."""
        try:
            with redis.Redis.from_url(self.store.url) as client:
                self.held += int(client.scard(f"agentmesh:wl:{name}"))  # type: ignore[arg-type]
        except redis.RedisError:  # the store is down too: all that is in flight may be its
            self.unread += 1
            self.held += self.server.in_flight

    def ended(self, tasks: list[str]) -> Counter[str]:
        """Lost, hung, wrong, and facts that were written twice."""
        found: Counter[str] = Counter()
        until = time.monotonic() + PATIENCE_S
        for task in tasks:
            try:
                value = self.mesh.get(task).result(timeout_s=max(0.1, until - time.monotonic()))
                found["wrong"] += value != expected(task)
            except TimeoutError:
                found["hung"] += 1
            except MeshError as e:
                print(f"{task}: {e}")
                found["lost"] += 1
            for member in drive(self.mesh.journal.tree(task)):
                events = drive(self.mesh.journal.events(member))
                ends = Counter(e.n for e in events if isinstance(e, StepDone | StepFailed))
                ends.update(-e.first for e in events if isinstance(e, GatherClosed))
                found["twice"] += sum(count - 1 for count in ends.values())
        return found

    def repeats(self) -> tuple[int, int]:
        """LLM calls and tool effects beyond the first of each."""
        asked = Counter(json.dumps(r.body["messages"]) for r in self.server.requests)
        done = Counter(line.split(" ", 1)[1] for line in self.log.read_text().splitlines())
        return asked.total() - len(asked), done.total() - len(done)


def main() -> int:
    """Print the table; 1 when a promise was broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", default="workers,store", help="of workers, store, stop, host")
    parser.add_argument("--every", type=float, default=0.25, help="seconds between two runs")
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    runs = 1000 if given.full else given.runs
    print(f"seed {given.seed}, {runs} runs, faults {given.faults}; agentmesh {version('agentmesh-celery')}, "
          f"celery {version('celery')}, redis-py {version('redis')}; {machine()}", flush=True)  # fmt: skip
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(a_server(ValkeyServer))
        server = stack.enter_context(FakeOpenAI(answer, latency_s=0.3))
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tools"
        log.touch()
        config = Config(broker=store.broker_url, journal=store.url)
        mesh = Mesh(load_crew(CREW), config=config)
        stack.callback(mesh.close)
        env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k", "CHAOS_LOG": str(log)}
        hosts = [stack.enter_context(Host(CREW, config, processes=3, env=env)) for _ in range(2)]
        oracle = Oracle(mesh, store, server, log)
        kinds = {
            "workers": lambda: KillWorker(*hosts, every_s=2.0, victim=oracle.victim),
            "store": lambda: KillServer(store, every_s=9.0),
            "stop": lambda: StopWorker(*hosts, every_s=10.0, for_s=config.lease_s + 2, victim=oracle.victim),
            "host": lambda: KillHost(*hosts, every_s=20.0, victim=oracle.victim),
        }
        faults = [kinds[name]() for name in given.faults.split(",")]
        tasks = [f"t{i}" for i in range(runs)]
        began = time.monotonic()
        with Chaos(faults, seed=given.seed) as chaos:
            for i, task in enumerate(tasks):
                mesh.start(mesh.crew.lead, task, id=task)
                time.sleep(given.every)
                if (i + 1) % 50 == 0:
                    print(f"{i + 1} runs begun, {len(chaos.log)} strikes, {time.monotonic() - began:.0f} s", flush=True)
        found = oracle.ended(tasks)
        calls, effects = oracle.repeats()
        struck = Counter(s.fault for s in chaos.log)
    print(", ".join(f"{count} x {name}" for name, count in sorted(struck.items())) or "no strike",
          f"in {time.monotonic() - began:.0f} s")  # fmt: skip
    print(f"lost {found['lost']}  hung {found['hung']}  wrong {found['wrong']}  ended twice {found['twice']}  "
          f"LLM calls repeated {calls} of {runs * CALLS} (leases held by the struck {oracle.held}, unread {oracle.unread})  "
          f"tool effects repeated {effects}")  # fmt: skip
    return int(any(found[k] for k in ("lost", "hung", "wrong", "twice")) or calls > oracle.held)


if __name__ == "__main__":
    sys.exit(main())
