"""A seeded world around the protocol: clients, workers that die at any line, a broker that loses, repeats and reorders.

`simulate(seed)` raises Violation with what went wrong; one seed gives one course of events.
"""

import heapq
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agentmesh.journal import maintenance
from agentmesh.journal.transaction import Tables, Transaction
from agentmesh.testing.oracle import Oracle, Stage, Violation, message, next_plan, random_program

TTL, SWEEP, PATIENCE = 2_000, 400, 600_000
POISON_MOST = 12  # deaths until a step is quarantined: two, then with a quarter as many at each, then three alone


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities of faults, 0 to 1."""

    loss: float = 0.08
    repeat: float = 0.08
    crash: float = 0.06
    zombie: float = 0.04
    reply_lost: float = 0.08
    renewing: bool = True
    tokens: bool = True


@dataclass
class World:
    """One simulated deployment: its runs, workers, messages and clock, in milliseconds."""

    seed: int
    faults: Faults = Faults()
    now: int = 0
    tables: Tables = field(default_factory=Tables)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.oracle = Oracle(self.tables, self._program)
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._tokens = itertools.count()
        self._programs: dict[str, list[Stage]] = {}
        self._workers = {f"w{i}": 0 for i in range(3)}  # name -> generation: a death voids the work of older ones
        self._cancel: str = ""
        self._poison = ""  # this unit kills every process that executes it
        self._poisoned = self.rng.random() < 0.15
        self.poison_deaths = 0

    # ---- time ----------------------------------------------------------------------------------
    def at(self, delay: int, what: Callable[[], None]) -> None:
        """Call `what` after so many milliseconds."""
        heapq.heappush(self._agenda, (self.now + delay, next(self._order), what))

    def run(self) -> None:
        """Run until every run has ended and nothing is left to do."""
        for i in range(self.rng.randint(1, 3)):
            self._programs[f"r{i}"] = random_program(self.rng)
            self.at(self.rng.randint(0, 500), lambda run=f"r{i}": self._begin(run))  # type: ignore[misc]
            for _ in range(self.rng.randint(0, 8)):  # a decision arrives while it runs
                self.at(self.rng.randint(100, 9_000), lambda run=f"r{i}": self._raise(run))  # type: ignore[misc]
        if self.rng.random() < 0.2:
            self._cancel = "r0"
            self.at(self.rng.randint(500, 6_000), lambda: self._tell("r0", "RunCancelled", 0))
        self.at(SWEEP, self._sweep)
        while self._agenda and self.now < PATIENCE:
            self.now, _, what = heapq.heappop(self._agenda)
            what()
            if self._over():
                break
        self.oracle.check_end(self._programs, self._cancel, self.now)

    def _over(self) -> bool:
        runs = self.tables.zsets["runs"]
        return len(runs) == len(self._programs) and not self.tables.zsets["open"]

    # ---- verbs ---------------------------------------------------------------------------------
    def verb(self, name: str, **args: Any) -> tuple[dict[str, Any], list[str]]:
        """One atomic verb; its messages go to the broker, and the oracle checks the store."""
        store = Transaction(self.tables, self.now)
        reply = maintenance.ALL_VERBS[name](store, args)
        for _, head, _, _ in store.sent:
            self._send(head.rstrip("#"))
        self.oracle.look()
        return reply

    def _send(self, unit: str) -> None:
        copies = 0 if self.rng.random() < self.faults.loss else 1 + (self.rng.random() < self.faults.repeat)
        for _ in range(copies):
            self.at(self.rng.randint(1, 120), lambda: self._deliver(unit))

    def _begin(self, run: str) -> None:
        args = {"run": run, "spec": {"crew": "c", "version": "", "agent": "A", "wire": message(f"a|{run}")},
                "started": '{"e":"RunStarted"}', "digest": "d", "next": next_plan(run, self._program(run), [])}  # fmt: skip
        self.verb("begin", **args)
        if self.rng.random() < self.faults.reply_lost:
            self.verb("begin", **args)

    def _program(self, run: str) -> list[Stage]:
        if run in self._programs:
            return self._programs[run]
        parent, _, n = run.rpartition("/")
        at = 1
        for stage in self._program(parent):
            width = stage[1] if stage[0] == "gather" else 1
            if at <= int(n) < at + width:
                return list(stage[4] if stage[0] == "gather" else stage[1])
            at += width
        raise Violation(f"run {run} has no program")

    def _tell(self, run: str, kind: str, n: int) -> None:
        self.verb("signal", run=run, kind=kind, n=n, event=json.dumps({"e": kind, **({"n": n} if n else {})}), up="{}")

    def _raise(self, run: str) -> None:
        self.verb("signal", run=run, kind="LimitRaised", n=0, event='{"e":"LimitRaised"}', limits={"turns": 10**6})

    # ---- a worker ------------------------------------------------------------------------------
    def _deliver(self, unit: str) -> None:
        worker = self.rng.choice(list(self._workers))
        generation = self._workers[worker]
        if self._dies(worker, unit):
            return
        name = self._name(worker)
        token = f"t{next(self._tokens)}"
        run = unit.split("|")[1]
        args = {"unit": unit, "worker": name, "token": token, "version": 0, "crew": "c", "crew_version": "", "ttl": TTL}
        head, lines = self.verb("claim", **args)
        if self.rng.random() < self.faults.reply_lost:  # the client library retries
            if not self.faults.tokens:
                args["token"] = f"t{next(self._tokens)}"
            head, lines = self.verb("claim", **args)
            if head.get("no") == "busy" and not self.faults.tokens:
                return  # it holds the lease without knowing it
        if head.get("no") == "room":  # it waits in the worker
            self.at(100, lambda: self._deliver(unit))
        if "no" in head:
            return
        if self._dies(worker, unit) or self._kills(worker, unit):
            return
        fence = head["fence"]
        if unit[0] == "a":
            self.at(
                self.rng.choice([5, 60, 700]),
                lambda: self._plan_of(worker, generation, unit, run, fence, head["version"], lines),
            )
            return
        self.oracle.executed[unit] += 1
        needs = self.rng.choice([50, 200, 900, 3_000])
        if self.rng.random() < self.faults.zombie:
            self.oracle.excuses[unit] += 1
            needs += 3 * TTL  # it is stopped for longer than its lease, without renewing
        elif self.faults.renewing:
            for step in range(TTL // 3, needs, TTL // 3):
                self.at(step, lambda: self._renew(worker, generation, unit, fence))
        self.at(needs, lambda: self._commit(worker, generation, unit, run, fence, head["version"], lines))

    def _renew(self, worker: str, generation: int, unit: str, fence: int) -> None:
        if self._workers[worker] == generation:
            self.verb("renew", worker=self._name(worker), leases=[[unit, fence]], ttl=TTL)

    def _commit(
        self, worker: str, generation: int, unit: str, run: str, fence: int, version: int, lines: list[str]
    ) -> None:  # fmt: skip
        if self._workers[worker] != generation or self._dies(worker, unit):
            return
        n = int(unit.split("|")[2])
        roll = self.rng.random()
        how, event = "done", {"e": "StepDone", "n": n}
        if roll < 0.1:
            how, event = "retried", {"e": "StepRetried", "n": n}
            self.oracle.excuses[unit] += 1
        elif roll < 0.2 and self.tables.hget(f"st:{run}", str(n)) and self._in_gather(run, n):
            how, event = "failed", {"e": "StepFailed", "n": n}
        text = json.dumps(event)
        args: dict[str, Any] = {"unit": unit, "fence": fence, "event": text, "how": how, "version": version}
        args["usage"] = {"turns": 1}
        if how == "retried":
            args["delay"] = self.rng.choice([0, 800])
        else:
            args["next"] = next_plan(run, self._program(run), [*lines, f"0 {text}"])
        self.verb("commit", **args)
        if self.rng.random() < self.faults.reply_lost:
            self.verb("commit", **args)

    def _in_gather(self, run: str, n: int) -> bool:
        at = 1
        for stage in self._program(run):
            at += stage[1] if stage[0] == "gather" else 1
            if n < at:
                return bool(stage[0] == "gather")
        return False

    def _plan_of(
        self, worker: str, generation: int, unit: str, run: str, fence: int, version: int, lines: list[str]
    ) -> None:
        if self._workers[worker] != generation or self._dies(worker, unit):
            return
        args = {"run": run, "fence": fence, "version": version, "next": next_plan(run, self._program(run), lines)}
        head, more = self.verb("plan", **args)
        if head.get("no") == "conflict":
            later = [*lines, *more]
            self.at(5, lambda: self._plan_of(worker, generation, unit, run, fence, head["version"], later))
        elif self.rng.random() < self.faults.reply_lost:
            self.verb("plan", **args)

    def _dies(self, worker: str, unit: str) -> bool:
        """Whether the process dies now, with everything it had in flight."""
        dies = self.rng.random() < self.faults.crash
        if dies:
            self._end(worker, unit)
        return dies

    def _kills(self, worker: str, unit: str) -> bool:
        """Whether this unit is the poison pill: then its process dies."""
        if self._poisoned and not self._poison and unit[0] == "s":
            self._poison = unit
        if unit != self._poison:
            return False
        self.oracle.executed[unit] += 1
        self._end(worker, unit)
        self.poison_deaths += 1
        if self.poison_deaths > POISON_MOST:
            raise Violation(f"{unit} killed {self.poison_deaths} processes and was not held")
        return True

    def _end(self, worker: str, unit: str) -> None:
        name = self._name(worker)
        self._workers[worker] += 1
        for held in self.tables.smembers(f"wl:{name}"):
            self.oracle.excuses[held] += 1
        self.oracle.excuses[unit] += 1
        if self.rng.random() < 0.5:  # a supervisor sees it; else the lease expires
            self.at(20, lambda: self._release(name))

    def _name(self, worker: str) -> str:
        """A restarted process has another name."""
        return f"{worker}.{self._workers[worker]}"

    def _release(self, worker: str) -> None:
        self.verb("release", worker=worker, crashed=1, queues=["q", "q.suspects"])

    def _sweep(self) -> None:
        self.at(SWEEP, self._sweep)
        empty = ["q", "q.suspects"] if self.rng.random() < 0.3 else []
        self.verb("sweep", worker=self.rng.choice(["s0", "s1"]), ttl=TTL, limit=50, empty=empty, look=int(not empty))
        for unit in list(self.tables.zsets["held"]):
            self._answer(unit)

    def _answer(self, unit: str) -> None:
        """A person: approves what waits, revives what is quarantined, and resolves the poison pill."""
        _, run, *rest = unit.split("|")
        n = int(rest[0]) if rest else 0
        if self.tables.hget(f"st:{run}", str(n) if n else "a")["why"] != "quarantined":
            self._tell(run, "Approved", n)
        elif unit != self._poison:
            self._tell(run, "StepRevived", n)
        else:
            self.verb("signal", run=run, kind="StepResolved", n=n, action="done", event=f'{{"e":"StepDone","n":{n}}}')


def simulate(seed: int, faults: Faults = Faults()) -> World:
    """Run one world to its end.

    Raises:
        Violation: a promise was broken; the message names the seed.
    """
    world = World(seed, faults)
    try:
        world.run()
    except Violation as e:
        raise Violation(f"seed {seed}: {e}") from None
    return world
