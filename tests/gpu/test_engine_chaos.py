"""Seeded random requests, some cancelled, in a small engine whose loop dies now and then: each answer is the one it has alone.

A seed that broke something stays in SEEDS.
"""

import random
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple

import pytest
import torch

from agentmesh.inference.batching import Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.grammar import Grammars, grammar_of
from agentmesh.inference.request import Done, InferenceRequest
from agentmesh.message import ToolSpec
from agentmesh.testing.tiny_models import END, VOCABULARY, make_model, make_tokenizer

SEEDS = [1, 2]
MANY, WAIT_S = 40, 60
WORDS = VOCABULARY - 5  # ids that no prompt has stay free for a poison
POISON = VOCABULARY - 1
POINT = {
    "type": "object", "properties": {"x": {"type": "boolean"}, "s": {"type": "string"}}, "required": ["x", "s"],
    "additionalProperties": False,
}  # fmt: skip
GO = ToolSpec("go", "Go.", {"type": "object", "properties": {"to": {"enum": ["日", "🙂"]}}, "required": ["to"]})
ASKED = [grammar_of((), POINT), grammar_of([GO], None, "required"), grammar_of([GO], None)]


class Asked(NamedTuple):
    """A request to be made as often as it is wanted; `leaves_after_s` below 0 stays."""

    what: dict[str, Any]
    grammar: str
    listens: bool
    leaves_after_s: float

    def request(self, grammars: Grammars) -> InferenceRequest:
        return InferenceRequest(**self.what, constraint=grammars.constraint(self.grammar) if self.grammar else None)


def crowd(draw: random.Random) -> list[Asked]:
    shared = [draw.randrange(WORDS) for _ in range(80)]
    asked = []
    for _ in range(MANY):
        size = draw.choice([1, 2, 15, 16, 17, 33, draw.randrange(1, 80)])
        prompt = shared[:size] if draw.random() < 0.4 else [draw.randrange(WORDS) for _ in range(size)]
        what = {
            "tokens": tuple(prompt), "most_tokens": draw.choice([1, 2, 15, 16, 17, draw.randrange(1, 40)]),
            "ends": frozenset({END, *draw.sample(range(WORDS), draw.choice([0, 3]))}),
            "temperature": draw.choice([0.0, 0.0, 1e-40, 0.5, 1.5, 9.0, 1e30]), "top_k": draw.choice([0, 1, 2, 40, 5000]),
            "top_p": draw.choice([1.0, 0.0, 1e-9, 0.5, 0.9999]), "seed": draw.randrange(2**63),
            "logprobs": draw.random() < 0.3,
        }  # fmt: skip
        grammar = draw.choice([*ASKED, "", "", ""])
        asked.append(Asked(what, grammar, draw.random() < 0.4, draw.choice([-1.0, -1.0, 0.0, draw.random() / 5])))
    return asked


class Faulty:
    """A forward pass that dies at the steps it is told, and at every prompt with the poison."""

    def __init__(self, model: Any, steps: dict[int, Exception]) -> None:
        self.step, self._forward, self._steps = 0, model.forward, steps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.step += 1
        if (error := self._steps.pop(self.step, None)) is not None:
            raise error
        if POISON in kwargs["input_ids"][0].tolist():
            raise RuntimeError("poison")
        return self._forward(*args, **kwargs)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_says_what_it_says_alone(make_engine: Callable[..., InferenceEngine], seed: int) -> None:
    draw = random.Random(seed)
    grammars = Grammars(make_tokenizer(), VOCABULARY, [END])
    asked, model = crowd(draw), make_model()
    calm = make_engine()
    alone = [calm.submit(a.request(grammars)).result(WAIT_S) for a in asked]
    assert not any(POISON in done.tokens for done in alone), (
        "choose another seed: one answer contains the poison on its own"
    )
    # one of each: what breaks the loop twice with a request alone in it is that one's end
    strikes = {draw.randrange(1, 120): error for error in (RuntimeError("passing"), torch.OutOfMemoryError("passing"))}
    engine = make_engine(
        Shape(pages=12, page_tokens=16, batch_tokens=draw.choice([9, 33, 64]), batch_requests=draw.choice([5, 32])),
        model=model,
    )
    model.forward = Faulty(model, strikes)
    futures, heard, leaving = list[Future[Done]](), list[list[tuple[int, ...]]](), list[tuple[float, Future[Done]]]()
    began, poisoned = time.monotonic(), draw.randrange(MANY)
    for i, one in enumerate(asked):
        if i == poisoned:
            culprit = engine.submit(InferenceRequest((5, POISON), 4))
        pieces = list[tuple[int, ...]]()
        hear = (lambda said, pieces=pieces: bool(pieces.append(tuple(said)))) if one.listens else None
        futures.append(engine.submit(one.request(grammars), hear))
        heard.append(pieces)
        if one.leaves_after_s >= 0:
            leaving.append((one.leaves_after_s, futures[-1]))
    for after_s, future in sorted(leaving, key=lambda it: it[0]):
        time.sleep(max(0.0, began + after_s - time.monotonic()))
        future.cancel()
    stayed = 0
    for i, (future, single) in enumerate(zip(futures, alone, strict=True)):
        try:
            done = future.result(WAIT_S)
        except CancelledError:
            assert asked[i].leaves_after_s >= 0
            continue
        stayed += 1
        assert (done.tokens, done.finish) == (single.tokens, single.finish), f"request {i}: {asked[i]}"
        assert done.logprobs == pytest.approx(single.logprobs, abs=1e-3)
        if asked[i].listens:
            assert all(said == single.tokens[: len(said)] for said in heard[i])
    assert stayed >= MANY // 3
    with pytest.raises(Exception, match=r"this request of 2 \+ 4 tokens crashes the engine's loop.*(poison|passing)"):
        culprit.result(WAIT_S)
    until_idle(engine)
    assert engine.gauge.deaths >= 2  # the poison alone
    assert (engine._sampler._rows, engine._flights, list(engine._parked), list(engine._suspects)) == ({}, {}, [], [])


def until_idle(engine: InferenceEngine) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (engine.gauge.idle and engine.gauge.free_pages == engine.gauge.pages and engine._batching.idle):
        assert time.monotonic() < deadline, engine.gauge
        time.sleep(0.005)
