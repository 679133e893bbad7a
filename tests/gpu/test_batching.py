"""What a GPU would not forgive, seen on a CPU: memory that is still held, inputs that are read before they are written."""

import contextlib
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agentmesh.inference.batching import Batching
from agentmesh.inference.device import DeviceLock
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import EngineDown, InferenceRequest
from agentmesh.testing.tiny_models import make_model

WAIT_S = 30


class Held:
    """Whether the caches of earlier loops are still in memory when another loop is made."""

    def __init__(self) -> None:
        self.caches: list[weakref.ref[Any]] = []
        self.alive: list[int] = []

    def make(self, *args: Any) -> Batching:
        self.alive.append(sum(cache() is not None for cache in self.caches))
        return Batching(*args)


def test_a_dead_loop_s_cache_is_gone_before_the_next_one_is_made(make_engine: Callable[..., InferenceEngine]) -> None:
    """Without the help of the collector, which knows nothing of what a worker loaded before it froze it."""
    model, steps, held = make_model(), list[int](), Held()
    forward = model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) in (3, 7):
            raise ValueError("a fault in a fault") from RuntimeError("a fault")
        return forward(*args, **kwargs)

    model.forward = broken
    engine = make_engine(model=model, batching=held.make)
    gc.disable()
    try:
        for _ in range(2):
            held.caches.append(weakref.ref(engine._batching.batch_processor.cache.cache_tensor))
            assert len(engine.submit(InferenceRequest((5, 6, 7), 3)).result(WAIT_S).tokens) == 3
    finally:
        gc.enable()
    assert (engine.gauge.deaths, held.alive) == (2, [0, 0, 0])


def test_an_engine_that_is_down_holds_nothing_but_the_reason(make_engine: Callable[..., InferenceEngine]) -> None:
    model = make_model()
    model.forward = lambda *args, **kwargs: (_ for _ in ()).throw(
        RuntimeError("CUDA error: unspecified launch failure")
    )
    engine = make_engine(model=model)
    with pytest.raises(EngineDown, match="CUDA error"):
        engine.submit(InferenceRequest((5, 6, 7), 3)).result(WAIT_S)
    assert engine._fatal_error is not None
    assert engine._fatal_error.__traceback__ is None  # its frames would hold the cache


def test_a_step_waits_for_what_was_written_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[Any] = []
    stream = SimpleNamespace(wait_stream=lambda other: happened.append(f"waits for the {other}"))
    batching: Any = object.__new__(Batching)
    batching._device_lock, batching._step_stack = DeviceLock(), contextlib.ExitStack()
    batching.model = SimpleNamespace(device="cuda")
    batching.batch_processor = SimpleNamespace(
        inputs_and_outputs=SimpleNamespace(compute_stream=stream),
        _generation_step=lambda model: happened.append("step"),
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    batching._generation_step()
    assert happened == ["waits for the stream of cuda", "step"]
