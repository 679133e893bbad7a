"""A loop of slots and a clock in the engine's place, to test what surrounds the engine: no weights, no computing.

Everything else is real: tokenizer, engine, dispatcher, streams. Each step takes a fixed time and adds one token to each request
that has a slot; the rest waits. Token ids are bytes, as of `testing.tiny`.
"""

import contextlib
import json
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from agentmesh.inference.batching import Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.grammar import Grammars
from agentmesh.inference.loader import Loaded
from agentmesh.inference.request import Gauge, Room
from agentmesh.inference.sampling import Sampler
from agentmesh.models import local
from agentmesh.testing.tiny_models import END, VOCABULARY, make_tokenizer

PAGE_TOKENS, CONTEXT = 16, 4096
ZERO, SPACE = make_tokenizer()("0 ")["input_ids"]  # of the digits the first


@dataclass(slots=True)
class Output:
    """What the loop says of a request; the names are the library's."""

    request_id: str
    generated_tokens: list[int] = field(default_factory=list)
    error: str | None = None
    over: bool = False

    def is_finished(self) -> bool:
        """Whether nothing more comes."""
        return self.over


@dataclass(slots=True)
class _SlotRequest:
    name: str
    size: int  # of prompt and answer
    steps: int
    signal: bool
    generated: list[int] = field(default_factory=list)


class SlotBatching:
    """Takes the place of inference.batching.Batching.

    Args:
        slots: requests of one step.
        step_s: how long a step takes.
        spread: an answer has (1 - spread) to (1 + spread) times the tokens it asked for, by its name.
        stamps: each step generates the milliseconds of `time.monotonic()` and a space, instead of one token.
        note: a file that gets a line for each step: when it ended, how many slots were taken, how many requests waited.
    """

    def __init__(
        self, model: Any, shape: Shape, sampler: Sampler, *, slots: int = 256, step_s: float = 0.05, spread: float = 0.0,
        stamps: bool = False, note: Path | None = None,
    ) -> None:  # fmt: skip
        pages = -(-CONTEXT // PAGE_TOKENS) * slots
        self.shape = replace(shape, pages=pages, page_tokens=PAGE_TOKENS, batch_tokens=slots, batch_requests=slots)
        self.error = RuntimeError("the loop ended")
        self._sampler, self._step_s, self._spread, self._stamps, self._note = sampler, step_s, spread, stamps, note
        self._new: deque[_SlotRequest] = deque()
        self._cancelled: deque[str] = deque()
        self._running: dict[str, _SlotRequest] = {}
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._over = False
        self.stepped_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name="agentmesh-slots")

    # ---- as Batching ---------------------------------------------------------------------------
    held_s = 0.0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def is_running(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def room(self) -> Room:
        """What fits."""
        return Room(self.shape.pages * PAGE_TOKENS, PAGE_TOKENS, CONTEXT, VOCABULARY)

    def begin(self, name: str, tokens: Sequence[int], most_tokens: int, ends: Sequence[int], *, tell: bool) -> bool:
        """Hand a request in."""
        share = 1 + self._spread * (2 * random.Random(name).random() - 1)
        self._new.append(_SlotRequest(name, len(tokens) + most_tokens, max(1, round(share * most_tokens)), tell))
        self._wake.set()
        return not self._over

    def cancel_request(self, name: str) -> None:
        """Take it out with the next step."""
        self._cancelled.append(name)
        self._wake.set()

    def outputs(self, timeout_s: float) -> list[Output]:
        """What was generated since the last call."""
        arrived: list[Output] = []
        with contextlib.suppress(queue.Empty):
            arrived.append(self._outputs.get(timeout=timeout_s))
            while True:
                arrived.append(self._outputs.get_nowait())
        return arrived

    def gauge(self, deaths: int) -> Gauge:
        """Its state for status reports."""
        taken = sum(-(-a.size // PAGE_TOKENS) for a in list(self._running.values()))
        return self._sampler.gauge(
            pages=self.shape.pages, free_pages=self.shape.pages - taken, waiting=len(self._new), stepped_s=self.stepped_s,
            idle=not (self._running or self._new), deaths=deaths,
        )  # fmt: skip

    def end(self) -> None:
        """Stop now."""
        self._over = True
        self._wake.set()
        self._thread.join()

    # ---- the loop ------------------------------------------------------------------------------
    def _run(self) -> None:
        out = self._note.open("a") if self._note is not None else None
        due = time.monotonic()
        while not self._over:
            self._admit()
            if not self._running:
                self.stepped_s = time.monotonic()
                self._wake.wait(0.5)
                self._wake.clear()
                due = time.monotonic()
                continue
            due = max(due + self._step_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            taken = len(self._running)
            self._step()
            if out is not None:
                out.write(json.dumps([time.monotonic(), taken, len(self._new)]) + "\n")
                out.flush()

    def _admit(self) -> None:
        while self._cancelled:
            name = self._cancelled.popleft()
            self._running.pop(name, None)
            self._new = deque(a for a in self._new if a.name != name)
        while self._new and len(self._running) < self.shape.batch_requests:
            one = self._new.popleft()
            self._running[one.name] = one

    def _step(self) -> None:
        sampler, now = self._sampler, time.monotonic()
        sampler.steps += 1
        sampler.running = len(self._running)
        sampler.largest = max(sampler.largest, sampler.running)
        sampler.new_tokens += sampler.running
        piece = [ZERO + int(c) for c in str(int(now * 1000))] + [SPACE] if self._stamps else [ZERO]
        for one in list(self._running.values()):
            one.generated += piece
            one.steps -= 1
            if not one.steps:
                del self._running[one.name]
            if one.signal or not one.steps:
                self._outputs.put(Output(one.name, list(one.generated), over=not one.steps))
        self.stepped_s = time.monotonic()


class SlotModel(local.LocalModel):
    """A LocalModel on SlotBatching."""

    options: dict[str, Any] = {}

    def load(self) -> Loaded:
        """The engine on its slots."""
        with self._lock:
            if self._loaded is None or not self._loaded.engine.alive:
                tokenizer = make_tokenizer()
                engine = InferenceEngine(
                    SimpleNamespace(device=torch.device("cpu")), self._shape, on_fatal=self._on_fatal,
                    batching=lambda model, shape, sampler: SlotBatching(model, shape, sampler, **self.options),
                )  # fmt: skip
                self._loaded = Loaded(
                    engine, tokenizer, Grammars(tokenizer, VOCABULARY, {END}), frozenset({END}), CONTEXT, True
                )
            return self._loaded


def install(**options: Any) -> None:
    """Make every `local:` model of this process a SlotModel; the options are SlotBatching's."""
    SlotModel.options = options
    local.LocalModel = SlotModel  # type: ignore[misc]  # models.named looks it up when a model is first named
