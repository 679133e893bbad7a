"""What the library does not forgive (docs/guides/gpu.md, "What the engine guards"): every way in which its loop can die."""

import concurrent.futures
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from agentmesh.errors import ContextTooLong, GpuOutOfMemory, ModelError
from agentmesh.inference.batching import Batching, Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import EngineDown, InferenceRequest
from agentmesh.testing.tiny_models import VOCABULARY, make_model

WAIT_S = 30
MakeEngine = Callable[..., InferenceEngine]


class Fault:
    """Makes the forward pass of a model raise while `when` says so."""

    def __init__(self, model: Any, error: Exception, when: Callable[[list[int]], bool]) -> None:
        self.times, self._forward, self._error, self._when = 0, model.forward, error, when
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._when(kwargs["input_ids"][0].tolist()):
            self.times += 1
            raise self._error
        return self._forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("tokens", "most", "error", "told"),
    [
        (
            (5,) * 200,
            900,
            ContextTooLong,
            r"has 200 tokens and asks for 900 more, and the model's context takes 1024 together",
        ),
        ((), 4, ModelError, "a request of 0 tokens that asks for 4 more is empty"),
        ((5,), 0, ModelError, "a request of 1 tokens that asks for 0 more is empty"),
        ((5, VOCABULARY), 4, ModelError, f"token id {VOCABULARY} is not in the model's vocabulary of {VOCABULARY}"),
        ((5, -1), 4, ModelError, "token id -1 is not in"),
    ],
)
def test_what_would_end_the_loop_is_refused_up_front(
    engine: InferenceEngine, tokens: tuple[int, ...], most: int, error: type[Exception], told: str
) -> None:
    other = engine.submit(InferenceRequest((5, 6, 7), 40))
    with pytest.raises(error, match=told):
        engine.submit(InferenceRequest(tokens, most))
    assert len(other.result(WAIT_S).tokens) == 40
    assert engine.gauge.deaths == 0


def test_what_the_cache_cannot_hold_is_refused_and_what_it_can_is_done(make_engine: MakeEngine) -> None:
    engine = make_engine(Shape(pages=10, page_tokens=16, batch_tokens=64))
    assert engine.room.longest == 144
    with pytest.raises(ContextTooLong, match="the cache of this process takes 144 together"):
        engine.submit(InferenceRequest((5,) * 100, 45))
    assert len(engine.submit(InferenceRequest((5,) * 100, 44)).result(WAIT_S).tokens) == 44


def test_two_requests_that_are_alike_both_get_an_answer(engine: InferenceEngine, answers: Any) -> None:
    same = InferenceRequest((5, 6, 7), 12)
    first, second = answers(engine, [same, same])
    assert first.tokens == second.tokens


def test_a_cancelled_future_gives_its_place_back(engine: InferenceEngine, eventually: Any) -> None:
    began = threading.Event()
    long = engine.submit(InferenceRequest((5, 6, 7), 500), lambda t: bool(began.set()))
    waiting = [engine.submit(InferenceRequest((5, 6, 7), 400)) for _ in range(30)]
    assert began.wait(WAIT_S)
    assert long.cancel()
    assert all(w.cancel() for w in waiting)
    eventually(lambda: engine.gauge.idle and engine.gauge.free_pages == engine.gauge.pages)
    assert engine.submit(InferenceRequest((5, 6, 7), 4)).result(WAIT_S).tokens
    with pytest.raises(concurrent.futures.CancelledError):
        long.result(0)


def test_a_dead_loop_is_made_anew_and_its_requests_begin_again(
    make_engine: MakeEngine, prompts: Any, answers: Any
) -> None:
    model = make_model()
    calm = [
        d.tokens
        for d in answers(make_engine(), [InferenceRequest(tuple(p), 20, temperature=1.0, seed=4) for p in prompts(6)])
    ]
    seen: list[int] = []
    fault = Fault(model, RuntimeError("a passing fault"), lambda ids: seen.append(1) is None and len(seen) == 9)
    engine = make_engine(model=model)
    heard: list[int] = []
    asked = [
        engine.submit(
            InferenceRequest(tuple(p), 20, temperature=1.0, seed=4), lambda t: heard.append(len(t)) is not None
        )
        for p in prompts(6)
    ]
    assert [f.result(WAIT_S).tokens for f in asked] == calm
    assert (fault.times, engine.gauge.deaths) == (1, 1)
    assert 1 in heard[heard.index(2) :]  # told again from the first token


def test_one_poison_among_sixty_three_others_fails_alone(make_engine: MakeEngine) -> None:
    model, poison = make_model(), 299
    fault = Fault(model, RuntimeError("it was the prompt"), lambda ids: poison in ids)
    engine = make_engine(Shape(pages=200, page_tokens=16, batch_tokens=64, batch_requests=64), model=model)
    # no answer contains the poisonous token on its own
    others = [engine.submit(InferenceRequest((5, 6 + i), 4, temperature=0.5, seed=i, top_k=3)) for i in range(63)]
    culprit = engine.submit(InferenceRequest((5, poison), 4))
    late = engine.submit(InferenceRequest((9, 9), 4, top_k=3))
    with pytest.raises(
        ModelError, match=r"this request of 2 \+ 4 tokens crashes the engine's loop.*RuntimeError: it was the"
    ):
        culprit.result(WAIT_S)
    assert all(f.result(WAIT_S).tokens for f in [*others, late])
    assert fault.times <= 9  # once for all, once more, then halves of 64


def test_no_memory_halves_the_batch_twice_and_then_the_worker_is_told(make_engine: MakeEngine, eventually: Any) -> None:
    model = make_model()
    told: list[Exception] = []
    Fault(model, torch.OutOfMemoryError("CUDA out of memory"), lambda ids: len(ids) > 16)
    engine = make_engine(Shape(pages=64, page_tokens=16, batch_tokens=64), model=model, on_fatal=told.append)
    assert len(engine.submit(InferenceRequest((5,) * 60, 4)).result(WAIT_S).tokens) == 4
    assert (engine.gauge.batch_tokens, engine.gauge.deaths, told) == (16, 2, [])
    Fault(model, torch.OutOfMemoryError("CUDA out of memory"), lambda ids: True)
    with pytest.raises(EngineDown, match="OutOfMemoryError: CUDA out of memory"):
        engine.submit(InferenceRequest((5,) * 60, 4)).result(WAIT_S)
    eventually(lambda: told)
    assert isinstance(told[0], torch.OutOfMemoryError)
    with pytest.raises(EngineDown):
        engine.submit(InferenceRequest((5,), 4))


def test_no_memory_without_a_worker_fails_the_request_that_is_too_much(make_engine: MakeEngine) -> None:
    model = make_model()
    Fault(model, torch.OutOfMemoryError("no memory"), lambda ids: 299 in ids)
    engine = make_engine(model=model)
    with pytest.raises(GpuOutOfMemory, match=r"2 \+ 4 tokens"):
        engine.submit(InferenceRequest((5, 299), 4)).result(WAIT_S)
    assert engine.submit(InferenceRequest((5, 6), 4)).result(WAIT_S).tokens


@pytest.mark.parametrize("said", ["CUDA error: an illegal memory access", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"])
def test_an_error_of_the_device_ends_the_engine(make_engine: MakeEngine, eventually: Any, said: str) -> None:
    model = make_model()
    told: list[Exception] = []
    Fault(model, RuntimeError(said), lambda ids: True)
    engine = make_engine(model=model, on_fatal=told.append)
    with pytest.raises(EngineDown, match=said):
        engine.submit(InferenceRequest((5, 6), 4)).result(WAIT_S)
    eventually(lambda: told)
    assert not engine.alive


def test_a_hung_loop_can_be_seen(make_engine: MakeEngine, eventually: Any) -> None:
    model, hang = make_model(), threading.Event()
    Fault(model, RuntimeError(), lambda ids: hang.wait(WAIT_S) and False)
    engine = make_engine(model=model)
    asked = engine.submit(InferenceRequest((5, 6), 4))
    before = engine.gauge.stepped_s
    eventually(lambda: time.monotonic() - engine.gauge.stepped_s > 0.2)
    assert engine.gauge.stepped_s <= max(before, engine.gauge.stepped_s)
    assert not engine.gauge.idle
    hang.set()
    assert asked.result(WAIT_S).tokens


def test_a_loop_that_hangs_while_it_is_made_anew_can_be_seen(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    engine, made, goes_on, seen = make_engine(), Batching.room, threading.Event(), list[bool]()
    monkeypatch.setattr(Batching, "room", lambda batching: (goes_on.wait(WAIT_S), made(batching))[1])
    fault = Fault(engine._model, RuntimeError("once"), lambda ids: fault.times == 0)
    asked = engine.submit(InferenceRequest((5, 6), 4))

    def watch() -> None:
        eventually(lambda: engine.hung_s > 0.3)
        seen.append(True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    watcher.join(5)  # the thread that makes the loop holds the lock that others wait for
    goes_on.set()
    assert seen
    assert len(asked.result(WAIT_S).tokens) == 4
    eventually(lambda: engine.hung_s == 0)


def test_a_thousand_cancellations_leave_nothing_behind(engine: InferenceEngine, eventually: Any) -> None:
    asked = [engine.submit(InferenceRequest((5 + i % 200, 6), 60)) for i in range(1000)]
    kept = asked[::100]
    for future in asked:
        if future not in kept:
            future.cancel()
    assert all(len(f.result(WAIT_S).tokens) == 60 for f in kept)
    eventually(lambda: engine.gauge.idle and engine.gauge.free_pages == engine.gauge.pages)
    assert engine._sampler._rows == {}


def test_a_closed_engine_fails_what_it_had_and_takes_no_more(engine: InferenceEngine) -> None:
    began = threading.Event()
    asked = engine.submit(InferenceRequest((5, 6, 7), 500), lambda t: bool(began.set()))
    assert began.wait(WAIT_S)
    engine.close()
    with pytest.raises(EngineDown):
        asked.result(WAIT_S)
    with pytest.raises(EngineDown, match="is closed"):
        engine.submit(InferenceRequest((5,), 1))


def test_a_forgotten_engine_lets_its_process_end() -> None:
    code = (
        "from agentmesh.testing.tiny_models import make_model\nfrom agentmesh.inference.engine import InferenceEngine\n"
        "from agentmesh.inference.batching import Shape\nfrom agentmesh.inference.request import InferenceRequest\n"
        "e = InferenceEngine(make_model(), Shape(pages=40, page_tokens=16))\n"
        "e.submit(InferenceRequest((5,), 400)); print(len(e.submit(InferenceRequest((5,), 4)).result().tokens))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
