"""The Lua scripts and the Python protocol, verb by verb on the same worlds: equal answers, messages and journals."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from agentmesh.journal.transaction import Tables
from agentmesh.testing.simulation import Faults, World


class Twin(World):
    """A world whose every verb is done twice: by the pure functions, and by the scripts on a real server."""

    alike: Any

    def verb(self, name: str, **args: Any) -> tuple[dict[str, Any], list[str]]:
        reply, sent = self.alike.both(self.tables, self.now, name, args, seed=self.seed)
        for unit in sent:
            self._send(unit)
        return reply


@pytest.mark.parametrize(
    "weather", [Faults(), Faults(loss=0.2, repeat=0.2, crash=0.12, zombie=0.1)], ids=["bad", "worse"]
)
def test_the_scripts_do_what_the_protocol_says(alike: Any, weather: Faults) -> None:
    for seed in range(5000, 5060):
        alike.client.flushdb()
        world = Twin(seed, weather)
        world.alike = alike
        world.run()
        alike.compare(world.tables)


def test_a_retry_is_carried_alike(alike: Any) -> None:
    """At-most-once calls in every state a cancelled run may leave them in, then planned again in every way."""
    doubts = 0
    for seed in range(300):
        alike.client.flushdb()
        world = SimpleNamespace(tables=Tables(), now=1_700_000_000_000)
        rng = random.Random(seed)

        def do(name: str, args: dict[str, Any], world: Any = world, seed: int = seed) -> dict[str, Any]:
            return alike.both(world.tables, world.now, name, args, seed=seed)[0][0]

        def call(n: int, run: str, rng: random.Random = rng) -> dict[str, Any]:
            state = rng.choice([{"state": "queued"}, {"state": "held", "held": "approve"}])
            once = rng.choice(
                [{"once": 1, "digest": "d"}, {"once": 1, "digest": "d"}, {"once": 1, "rec": 1, "digest": "d"}, {}]
            )
            event = f'{{"e":"StepPlanned","n":{n}}}'
            return {"n": n, "kind": "Call", "event": event, "wire": alike.wire(f"s|{run}|{n}", "q")} | state | once

        def gather(run: str, ns: list[int], rng: random.Random = rng) -> dict[str, Any]:
            joined = {"first": 1, "last": 6, "need": rng.randint(1, 6), "everyone": rng.randint(0, 1), "deadline": 0}
            return {"plans": [call(n, run) for n in ns], "gather": joined | {"window": rng.choice([0, 2])}}

        def work(run: str, rng: random.Random = rng, world: Any = world) -> None:
            for n in range(1, 7):
                if rng.random() < 0.3:
                    do("signal", {"run": run, "kind": "Approved", "event": '{"e":"Approved"}', "n": n})
                who = {"worker": "w", "token": f"{run}{n}", "ttl": 3_000, "version": 0, "crew": "c", "crew_version": ""}
                claimed = do("claim", {"unit": f"s|{run}|{n}", **who})
                if "ok" in claimed and rng.random() < 0.5:
                    how = rng.choice(["done", "failed", "retried", "doubt"])
                    done = {"unit": f"s|{run}|{n}", "fence": claimed["fence"], "how": how, "version": 0, "event": "{}"}
                    do("commit", done | ({"delay": 900} if how == "retried" else {}))
            if rng.random() < 0.4:
                do("release", {"worker": "w", "crashed": 1, "queues": []})

        begun = {"spec": alike.spec("r0") | {"on_limit": "hold"}, "started": '{"e":"RunStarted"}', "digest": "d"}
        do("begin", {"run": "r0", **begun, "next": gather("r0", [1, 2, 3, 4, 5, 6])})
        work("r0")
        do("signal", {"run": "r0", "kind": "RunCancelled", "event": '{"e":"RunCancelled"}', "n": 0})
        world.now += 4_000
        do("sweep", {"worker": "v", "limit": 50, "ttl": 3_000, "empty": []})
        kept = [n for n in range(1, 7) if rng.random() < 0.3]
        new = [n for n in range(1, 7) if n not in kept]
        carried = {"from": "r0", "run": "r0~2", "kept": kept, "cut": [[n, rng.choice("ddde")] for n in new]}
        carried["events"] = [{"at": 5, "event": '{"e":"RunStarted"}'}]
        do("begin", {"run": "r0~2", **begun, "spec": alike.spec("r0~2"), "next": {}, "carried": [carried]})
        who = {"worker": "w", "token": "t", "ttl": 3_000, "version": 0, "crew": "c", "crew_version": ""}
        claimed = do("claim", {"unit": "a|r0~2", **who})
        do("plan", {"run": "r0~2", "fence": claimed["fence"], "version": 1, "next": gather("r0~2", new)})
        work("r0~2")
        alike.compare(world.tables)
        doubts += sum("StepInDoubt" in line for line in world.tables.lists["ev:r0~2"])
    assert doubts > 30
