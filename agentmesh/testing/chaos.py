"""Faults on a seeded schedule: each kind is a Poisson process of its own, so that one seed gives one schedule.

    with Chaos([KillWorker(host, every_s=2), KillServer(valkey, every_s=10)], seed=7) as chaos:
        ...
    print(chaos.log)

Source: the idea of worker death as a Poisson process is dask's, https://github.com/dask/distributed (chaos.py)
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from agentmesh.testing.hosts import Host
from agentmesh.testing.proxy import Proxy

Victim = Callable[[str, int], None]
SETTLE_S = 0.003  # the server has handled by then what a stopped process had sent


class HasPids(Protocol):
    """An object that runs worker processes: a Supervisor, a Host, a WorkerProcess."""

    @property
    def pids(self) -> dict[str, int]:
        """Their process ids by name."""
        ...


class RestartableServer(Protocol):
    """A server that can be killed and comes back over its data."""

    def kill(self) -> None:
        """SIGKILL."""

    def restart(self) -> None:
        """Start it, over the data it had."""


class ChaosFault(Protocol):
    """One kind of fault.

    Attributes:
        every_s: seconds between two strikes, on average.
    """

    every_s: float

    def strike(self, rng: random.Random) -> str:
        """Inject the fault; what was done, or "" where there was nothing to strike."""
        ...

    def heal(self) -> None:
        """Undo what lasts beyond a strike."""


def _workers(places: Sequence[HasPids]) -> list[tuple[str, int]]:
    return sorted(pair for place in places for pair in place.pids.items())


class _OnWorkers:
    """Chooses a running worker process.

    Args:
        every_s: seconds between two strikes, on average.
        victim: called with its name and pid while it is stopped, before the strike: to record which leases it holds.
    """

    def __init__(self, *places: HasPids, every_s: float, victim: Victim | None = None) -> None:
        self._places, self.every_s, self._victim = places, every_s, victim

    def _chosen(self, rng: random.Random) -> tuple[str, int] | None:
        """A worker, stopped; None where none runs."""
        running = _workers(self._places)
        if not running:
            return None
        name, pid = rng.choice(running)
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return None
        time.sleep(SETTLE_S)
        if self._victim is not None:
            self._victim(name, pid)
        return name, pid

    def heal(self) -> None:
        """Nothing lasts."""


class KillWorker(_OnWorkers):
    """SIGKILL of a worker process, as the kernel does when memory is short."""

    def strike(self, rng: random.Random) -> str:
        """See Fault."""
        chosen = self._chosen(rng)
        if chosen is None:
            return ""
        with suppress(ProcessLookupError):
            os.kill(chosen[1], signal.SIGKILL)
        return f"killed worker {chosen[0]}"


class StopWorker(_OnWorkers):
    """SIGSTOP of a worker process, and SIGCONT later; past its lease it resumes with stale work.

    Args:
        for_s: how long it is stopped, in seconds.
    """

    def __init__(self, *places: HasPids, every_s: float, for_s: float, victim: Victim | None = None) -> None:
        super().__init__(*places, every_s=every_s, victim=victim)
        self._for_s = for_s
        self._stopped: dict[int, threading.Timer] = {}

    def strike(self, rng: random.Random) -> str:
        """See Fault."""
        chosen = self._chosen(rng)
        if chosen is None:
            return ""
        timer = self._stopped[chosen[1]] = threading.Timer(self._for_s, self._resume, [chosen[1]])
        timer.daemon = True
        timer.start()
        return f"stopped worker {chosen[0]} for {self._for_s:g} s"

    def _resume(self, pid: int) -> None:
        self._stopped.pop(pid, None)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def heal(self) -> None:
        """Resume all stopped workers."""
        for pid, timer in list(self._stopped.items()):
            timer.cancel()
            self._resume(pid)


class KillHost:
    """SIGKILL of a host and everything on it, and a restart.

    Args:
        down_s: how long it is down, in seconds.
        victim: called with each worker's name and pid, just before.
    """

    def __init__(self, *hosts: Host, every_s: float, down_s: float = 1.0, victim: Victim | None = None) -> None:
        self._hosts, self.every_s, self._down_s, self._victim = hosts, every_s, down_s, victim

    def strike(self, rng: random.Random) -> str:
        """See Fault."""
        host = rng.choice(self._hosts)
        pid, workers = host.pid, host.pids
        if not pid:
            return ""
        for process in (pid, *workers.values()):  # all are stopped, so that what `victim` records is what dies
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        time.sleep(SETTLE_S)
        for name, worker in workers.items():
            if self._victim is not None:
                self._victim(name, worker)
        host.kill()
        time.sleep(self._down_s)
        host.start()
        return f"killed host {pid} with {len(workers)} workers"

    def heal(self) -> None:
        """Start those that are down."""
        for host in self._hosts:
            if not host.pid:
                host.start()


class KillServer:
    """SIGKILL of a store or broker, and a restart over its data.

    Args:
        down_s: how long it is down, in seconds.
    """

    def __init__(self, server: RestartableServer, *, every_s: float, down_s: float = 0.5) -> None:
        self._server, self.every_s, self._down_s = server, every_s, down_s

    def strike(self, rng: random.Random) -> str:
        """See Fault."""
        self._server.kill()
        time.sleep(self._down_s)
        self._server.restart()
        return f"killed {type(self._server).__name__} for {self._down_s:g} s"

    def heal(self) -> None:
        """`strike` has restarted it."""


class DisturbLinks:
    """One of a proxy's faults, chosen at random: a reset of all links, half-open links, silence, latency.

    Args:
        for_s: how long silence and latency last, in seconds.
        latency_s: added to each piece, in seconds.
    """

    def __init__(self, proxy: Proxy, *, every_s: float, for_s: float = 1.0, latency_s: float = 0.05) -> None:
        self._proxy, self.every_s, self._for_s, self._latency_s = proxy, every_s, for_s, latency_s

    def strike(self, rng: random.Random) -> str:
        """See Fault."""
        how = rng.choice(("reset", "half-open", "silence", "latency"))
        if how == "reset":
            return f"reset {self._proxy.reset()} links"
        if how == "half-open":
            return f"left {self._proxy.half_open()} links half-open"
        if how == "silence":
            self._proxy.silence()
        else:
            self._proxy.latency_s = self._latency_s
        time.sleep(self._for_s)
        self.heal()
        return f"{how} for {self._for_s:g} s"

    def heal(self) -> None:
        """End latency and silence."""
        self._proxy.latency_s = 0.0
        self._proxy.heal()


@dataclass(frozen=True, slots=True)
class Struck:
    """One strike, and when it began (`time.time`)."""

    at_s: float
    fault: str
    what: str


@dataclass
class Chaos:
    """Injects faults while its `with` lasts, each on a thread of its own.

    Args:
        seed: of the gaps and the choices; which process is chosen depends on what runs.
        most: strikes of each fault, at most; 0 for any number.

    Attributes:
        log: what was done, in order.
    """

    faults: Sequence[ChaosFault]
    seed: int = 0
    most: int = 0
    log: list[Struck] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._play, args=(i, fault), name=f"chaos-{type(fault).__name__}", daemon=True)
            for i, fault in enumerate(self.faults)
        ]
        self._error: BaseException | None = None

    def __enter__(self) -> "Chaos":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the strikes and undo what lasts.

        Raises:
            RuntimeError: a fault could not be injected; a test that passed would prove nothing.
        """
        self._over.set()
        for thread in self._threads:
            thread.join()
        for fault in self.faults:
            fault.heal()
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(f"the chaos itself failed: {error!r}") from error

    @property
    def over(self) -> bool:
        """Whether it has ended: it was stopped, or a fault could not be injected."""
        return self._over.is_set()

    def struck(self, kind: type[ChaosFault] | type[object]) -> int:
        """How often a kind of fault struck."""
        return sum(s.fault == kind.__name__ for s in self.log)

    def wait(self, timeout_s: float) -> bool:
        """Whether every fault struck `most` times within the time."""
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _play(self, i: int, fault: ChaosFault) -> None:
        due = time.monotonic()
        rng = random.Random(f"{self.seed}/{i}/{type(fault).__name__}")
        struck = 0
        while not self.most or struck < self.most:
            due = max(due + rng.expovariate(1 / fault.every_s), time.monotonic())
            if self._over.wait(due - time.monotonic()):
                return
            at_s = time.time()
            try:
                what = fault.strike(rng)
            except Exception as e:
                self._error = self._error or e
                self._over.set()  # the others stop too: `stop` says why
                return
            if what:
                struck += 1
                self.log.append(Struck(at_s, type(fault).__name__, what))
