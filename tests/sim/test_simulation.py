"""Seeded chaos over the real protocol; a failing seed prints the command that replays it."""

import os

import pytest

from agentmesh.testing.oracle import Violation
from agentmesh.testing.simulation import Faults, simulate

SEEDS = [int(os.environ["AGENTMESH_SEED"])] if "AGENTMESH_SEED" in os.environ else range(1000)


@pytest.mark.timeout(600)  # a thousand of them, on whatever machine
def test_the_protocol_keeps_its_promises_in_bad_weather() -> None:
    for seed in SEEDS:
        try:
            simulate(seed)
        except Violation as e:
            pytest.fail(f"{e}\nreplay it with: AGENTMESH_SEED={seed} python -m pytest {__file__}")


def test_in_fair_weather_nothing_is_executed_twice() -> None:
    fair = Faults(loss=0, repeat=0, crash=0, zombie=0, reply_lost=0)
    for seed in range(200):
        world = simulate(seed, fair)
        assert all(count <= 1 + world.oracle.excuses[unit] for unit, count in world.oracle.executed.items())
