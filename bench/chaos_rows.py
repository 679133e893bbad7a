"""The two rows of the chaos table: the same runs under the same schedule, on agentmesh and on stock Celery."""

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos_plain
from chaos_oracle import Oracle, Tally, answer, expected, repeats
from redis.exceptions import RedisError

from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import (
    Chaos,
    DisturbLinks,
    DisturbMessages,
    FakeOpenAI,
    Host,
    KillHost,
    KillServer,
    KillWorker,
    Proxy,
    RabbitServer,
    StopWorker,
    ValkeyServer,
)
from agentmesh.testing.servers import running_server

CREW = str(Path(__file__).parent / "chaos_crew.py")
LATENCY_S = 0.1
STOP_S = 12.0  # longer than the default lease of 10 s
PATIENCE_S = 60.0  # a run that has not ended so long after the last fault has hung
STORM_S = 240.0  # and so has one that has not ended so long after its start, whatever the weather
PLAIN_RUNS = 200  # of plain Celery at least; more are begun until as many were killed
PLAIN_STORM_S = (
    60.0  # plain Celery's; its visibility timeout is 5 s. Else its hung runs keep all others from being tried
)


def play(
    start: Callable[[str], Callable[[float], Any]],
    runs: int,
    at_once: int,
    more: Callable[[], bool],
    calm: Callable[[], None],
    storm_s: float = STORM_S,
) -> dict[str, Any]:
    """What each run gave; so many at a time, and on until nobody wants more; the last ones end in good weather."""
    results: dict[str, Any] = {}
    lock, began = threading.Lock(), time.monotonic()
    calm_at: list[float] = []
    broken: list[Exception] = []

    def one() -> None:
        while True:
            with lock:
                if len(results) >= runs and not more():
                    calm_at.append(time.monotonic())
                    try:
                        calm()
                    except Exception as e:
                        broken.append(e)
                    return
                task = f"r{len(results)}"
                results[task] = None
            try:
                wait, until = start(task), time.monotonic() + storm_s
                while True:
                    try:
                        results[task] = wait(min(PATIENCE_S, storm_s))
                        break
                    except TimeoutError:
                        now = time.monotonic()
                        if now > until or (calm_at and now > calm_at[0] + PATIENCE_S):
                            raise
            except Exception as e:
                results[task] = e
            if int(task[1:]) % 100 == 99:
                print(f"  {len(results)} runs, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=one) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]
    return results


def schedule(
    given: argparse.Namespace, places: list[Any], servers: dict[str, Any], victim: Callable[[str], Any]
) -> list[Any]:
    """The faults that were asked for, on agentmesh's hosts or plain Celery's processes."""
    faults: list[Any] = []
    if "workers" in given.faults:
        faults.append(KillWorker(*places, every_s=given.every, victim=victim("worker")))
    if "stop" in given.faults:
        faults.append(StopWorker(*places, every_s=given.every * 15, for_s=STOP_S, victim=victim("stop")))
    if "host" in given.faults and all(isinstance(p, Host) for p in places):
        faults.append(KillHost(*places, every_s=given.every * 10, victim=victim("host")))
    for name in ("store", "broker"):
        if name in given.faults and name in servers:
            faults.append(KillServer(servers[name], every_s=given.every * 5))
    if "proxy" in given.faults and "proxy" in servers:
        faults.append(DisturbLinks(servers["proxy"], every_s=given.every * 5))
    return faults


def mesh_row(given: argparse.Namespace) -> tuple[Tally, Chaos]:
    """agentmesh: two hosts of two supervised workers each."""
    with contextlib.ExitStack() as stack:
        store, broker = _servers(stack, given)
        servers = {"store": store} | ({"broker": broker} if broker is not store else {})
        seen_store, seen_broker = store.url, broker.broker_url
        if "proxy" in given.faults:
            servers["proxy"] = proxy = stack.enter_context(Proxy(store.url))
            seen_store, seen_broker = proxy.url, proxy.url if broker is store else seen_broker
        server = stack.enter_context(FakeOpenAI(answer, latency_s=LATENCY_S))
        log = _log(stack)
        env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k", "CHAOS_LOG": str(log)}
        said = stack.enter_context(log.with_name("hosts").open("w+"))
        config = Config(broker=seen_broker, journal=seen_store)
        hosts = [Host(CREW, config, processes=2, env=env, output=said) for _ in range(2)]
        mesh = Mesh(load_crew(CREW), config=Config(broker=broker.broker_url, journal=store.url))
        stack.callback(mesh.close)
        for host in hosts:
            stack.callback(host.kill)
            host.start()
        for host in hosts:
            host.wait()
        oracle = Oracle(store.url, server, log)
        chaos = Chaos(schedule(given, hosts, servers, oracle.victim), seed=given.seed)
        if "messages" in given.faults:
            stack.enter_context(DisturbMessages(broker.broker_url, mesh.crew.queues.broker_names(), seed=given.seed))
        tally, began = Tally(), time.monotonic()
        lead = mesh.crew.agent("Lead")

        def start(task: str) -> Callable[[float], Any]:
            run = mesh.start(lead, task, run_id=task)
            return lambda timeout_s: run.result(timeout_s=timeout_s)

        with chaos:
            results = play(start, given.runs, given.at_once, lambda: _more(chaos, given, began), chaos.stop)
        tally.wall_s = time.monotonic() - began
        outages = [s.at_s for s in chaos.log if s.fault == KillServer.__name__]
        said.seek(0)
        tally.notes += [f"a host said: {line.strip()}"[:300] for line in said if " ERROR " in line]
        return oracle.count(mesh, results, tally, outages), chaos


def plain_row(given: argparse.Namespace) -> tuple[Tally, Chaos]:
    """Stock Celery: four processes, started again when they end. One run is one chord in a chain."""
    with contextlib.ExitStack() as stack:
        store, broker = _servers(stack, given)
        servers = {"store": store} | ({"broker": broker} if broker is not store else {})
        server = stack.enter_context(FakeOpenAI(answer, latency_s=LATENCY_S))
        log = _log(stack)
        backend = store.broker_url
        env = {
            "OPENAI_BASE_URL": server.url,
            "CHAOS_LOG": str(log),
            "CHAOS_BROKER": broker.broker_url,
            "CHAOS_BACKEND": backend,
        }
        os.environ |= env
        chaos_plain.app.conf.update(broker_url=broker.broker_url, result_backend=backend)
        workers = stack.enter_context(chaos_plain.Workers(4, env))
        chaos = Chaos(schedule(given, [workers], servers, lambda fault: None), seed=given.seed)
        began = time.monotonic()

        def start(task: str) -> Callable[[float], Any]:
            started = chaos_plain.start(task)
            return lambda timeout_s: _plain_result(started, timeout_s)

        with chaos:
            more = lambda: _more(chaos, given, began)  # noqa: E731
            results = play(start, min(given.runs, PLAIN_RUNS), given.at_once, more, chaos.stop, PLAIN_STORM_S)
        tally = Tally(runs=len(results), wall_s=time.monotonic() - began)
        for task, result in results.items():
            tally.hung += isinstance(result, TimeoutError)
            if not isinstance(result, TimeoutError) and result != expected(task):
                tally.lost += 1
                tally.notes.append(f"lost: {task}: {result!r}"[:300])
        tally.llm_repeated = repeats(Counter(str(r.body["messages"]) for r in server.requests))
        lines = Counter(log.read_text().splitlines())
        tally.double = repeats(Counter({x: n for x, n in lines.items() if x.startswith("end:")}))
        tally.tools_repeated = repeats(lines) - tally.double
    return tally, chaos


def _plain_result(started: Any, timeout_s: float) -> Any:
    """Asked again and again: a backend that was killed loses those who listen to it."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with contextlib.suppress(OSError, RedisError):
            if started.ready():
                return started.get(timeout=5)
        time.sleep(0.05)
    raise TimeoutError(started.id)


def _servers(stack: contextlib.ExitStack, given: argparse.Namespace) -> tuple[Any, Any]:
    """The store and the broker; one Valkey is both."""
    store = stack.enter_context(running_server(ValkeyServer))
    return store, stack.enter_context(running_server(RabbitServer)) if given.broker == "rabbitmq" else store


def _log(stack: contextlib.ExitStack) -> Path:
    log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))) / "log"
    log.touch()
    return log


def _more(chaos: Chaos, given: argparse.Namespace, began: float) -> bool:
    """Whether the schedule has not struck as often as was asked for; five minutes at most."""
    now_s = time.monotonic() - began
    if chaos.over:
        return False
    short = ("workers" in given.faults and chaos.struck(KillWorker) < given.kills) or (
        "store" in given.faults and chaos.struck(KillServer) < given.store_kills
    )
    return (short and now_s < 300) or now_s < given.seconds
