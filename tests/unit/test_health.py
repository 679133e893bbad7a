"""What a probe is told: which numbers anybody may see, and why something is not as it should be."""

from dataclasses import replace

from agentmesh.observability.engine_status import EngineStatus
from agentmesh.worker.health_server import Health

WELL = EngineStatus("host:1/a", 7, "m", "cuda:0", at_s=100.0, in_hand=3)


def test_all_is_well() -> None:
    now = Health(2, 2, True, [WELL], now_s=109.0)
    assert now.good
    assert now.numbers == {"workers": {"wanted": 2, "ready": 2}, "journal": True, "engines": {"there": 1, "well": 1}}
    assert "why" not in now.told
    (engine,) = now.told["engines"]
    assert (engine["in_hand"], engine["age_s"], engine["ails"]) == (3, 9.0, "")


def test_each_reason_is_told() -> None:
    silent, stuck = replace(WELL, at_s=90.0), replace(WELL, device="cuda:1", stuck_s=12.3)
    now = Health(3, 2, False, [silent, stuck, WELL], now_s=101.0)
    assert not now.good
    assert now.told["why"] == [
        "the journal's server does not respond",
        "2 of 3 workers consume",
        "the worker of 'm' on cuda:0 has not reported for 11 s",
        "the worker of 'm' on cuda:1 has 3 steps in flight and its engine has made no progress for 12 s",
    ]
    assert now.numbers["engines"] == {"there": 3, "well": 1}


def test_one_reason_is_enough() -> None:
    assert not Health(1, 1, True, [replace(WELL, stuck_s=10.1)], now_s=101.0).good
    assert Health(1, 1, True, [replace(WELL, stuck_s=9.9)], now_s=101.0).good
    assert Health(0, 0, True).told == {"ready": True, "workers": {"wanted": 0, "ready": 0}, "journal": True}
