"""A request that is cancelled at any moment leaves no work behind."""

import time
from typing import Any

import pytest
from transformers.generation.continuous_batching import continuous_api

from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import InferenceRequest

WAIT_S = 30


def test_a_request_that_is_cancelled_before_the_loop_has_seen_it_is_not_computed(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop reads who came, then who left: of one that did both between, it hears that it left first."""
    plain, cancelled = continuous_api.drain_queue, list[bool]()

    def drained(given: Any) -> Any:
        found = plain(given)
        if given is engine._batching.input_queue and not cancelled:
            cancelled.append(engine.submit(InferenceRequest((5, 6, 7), 900)).cancel())
        return found

    monkeypatch.setattr(continuous_api, "drain_queue", drained)
    deadline = time.monotonic() + WAIT_S
    while not (cancelled and engine.gauge.steps and engine._batching.idle):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert cancelled == [True]
    assert engine.gauge.steps < 10
    assert engine.gauge.free_pages == engine.gauge.pages
    assert len(engine.submit(InferenceRequest((5, 6, 7), 4)).result(WAIT_S).tokens) == 4
