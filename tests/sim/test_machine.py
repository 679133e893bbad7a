"""A hypothesis state machine over the verbs: it searches for the shortest sequence that breaks a promise."""

import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agentmesh.testing.oracle import next_plan, random_program
from agentmesh.testing.simulation import TTL, Faults, World

FAIR = Faults(loss=0, repeat=0, crash=0, zombie=0, reply_lost=0)


class Hands(World):
    """A world in which nothing happens on its own: messages and claimed work lie in bags, and somebody chooses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.messages: list[str] = []
        self.work: list[tuple[str, str, int, int, list[str]]] = []

    def _send(self, unit: str) -> None:
        self.messages.append(unit)

    def start(self, seed: int) -> None:
        run = f"r{len(self._programs)}"
        self._programs[run] = random_program(random.Random(seed))
        self._begin(run)

    def claim(self, unit: str) -> None:
        args = {"unit": unit, "worker": "w0", "token": f"t{next(self._tokens)}", "version": 0, "crew": "c",
                "crew_version": "", "ttl": TTL}  # fmt: skip
        head, lines = self.verb("claim", **args)
        if head.get("no") == "room":
            self.messages.append(unit)
        if "no" not in head:
            self.work.append((unit, unit.split("|")[1], head["fence"], head["version"], lines))

    def finish(self, i: int) -> None:
        unit, run, fence, version, lines = self.work.pop(i % len(self.work))
        if unit[0] == "a":
            head, more = self.verb(
                "plan", run=run, fence=fence, version=version, next=next_plan(run, self._program(run), lines)
            )
            if head.get("no") == "conflict":
                self.work.append((unit, run, fence, head["version"], [*lines, *more]))
            return
        text = f'{{"e": "StepDone", "n": {unit.split("|")[2]}}}'
        nxt = next_plan(run, self._program(run), [*lines, f"0 {text}"])
        self.verb("commit", unit=unit, fence=fence, event=text, how="done", version=version, usage={}, next=nxt)


class Machine(RuleBasedStateMachine):
    """Every order of claims, ends, losses, deaths and words."""

    @initialize(seed=st.integers(0, 10_000))
    def begin(self, seed: int) -> None:
        self.world: Any = Hands(0, FAIR)
        self.world.start(seed)

    @rule(i=st.integers(0, 50), lost=st.booleans(), twice=st.booleans())
    def deliver(self, i: int, lost: bool, twice: bool) -> None:
        if self.world.messages:
            unit = self.world.messages.pop(i % len(self.world.messages))
            if twice:
                self.world.messages.append(unit)
            if not lost:
                self.world.claim(unit)

    @rule(i=st.integers(0, 50))
    def finish(self, i: int) -> None:
        if self.world.work:
            self.world.finish(i)

    @rule(i=st.integers(0, 50))
    def forget(self, i: int) -> None:
        if self.world.work:
            self.world.work.pop(i % len(self.world.work))

    @rule()
    def die(self) -> None:
        self.world.verb("release", worker="w0", crashed=1, queues=["q", "q.suspects"])

    @rule(ms=st.integers(1, 5_000), empty=st.booleans())
    def sweep(self, ms: int, empty: bool) -> None:
        self.world.now += ms
        self.world.verb("sweep", worker="s", ttl=TTL, limit=50, empty=["q", "q.suspects"] if empty else [])

    @rule()
    def approve(self) -> None:
        for unit in list(self.world.tables.zsets["held"]):
            self.world._answer(unit)

    @rule(cancel=st.booleans())
    def speak(self, cancel: bool) -> None:
        self.world._tell("r0", "RunCancelled", 0) if cancel else self.world._raise("r0")

    @invariant()
    def promises(self) -> None:
        if hasattr(self, "world"):
            self.world.oracle.look()

    def teardown(self) -> None:
        """Then the weather turns fair, and everything ends."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for _ in range(400):
            if world._over():
                return
            while world.messages:
                world.claim(world.messages.pop(0))
            while world.work:
                world.finish(0)
            self.approve()
            world.now += 1_500
            world.verb("sweep", worker="s", ttl=TTL, limit=50, empty=["q", "q.suspects"])
        raise AssertionError("some run never ended")


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
