"""Many prompts, one model, shared batches: transformers' continuous batching behind a guard that makes it safe to share.

The library's loop dies of any exception and takes everybody's request with it. Here a dead loop is made anew and its
requests begin again from their prompts; what died twice is tried in halves, so that only the culprit fails.
"""

import atexit
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from agentmesh.errors import GpuOutOfMemory, ModelError
from agentmesh.inference.batching import Batching, Shape
from agentmesh.inference.device import Memory, breaks_device, memory_of
from agentmesh.inference.request import DemandEstimate, Done, EngineDown, Gauge, Request, Room
from agentmesh.inference.sampling import Sampler

log = logging.getLogger("agentmesh.gpu")

HALVINGS = 2  # of the tokens of a batch, when the device has no memory for it
DISPATCH_WAIT_S = 0.2  # how long the dispatcher waits for an output before it looks whether the loop lives
RETRIES_TOGETHER = 2  # a loop's deaths before the requests in it are tried apart
RETRIES_ALONE = (
    2  # a loop's deaths with one request in it, before that one is to blame: something else may have broken once
)

# Gets the answer's tokens so far; True is enough, and the answer ends there.
OnTokens = Callable[[Sequence[int]], bool]


@dataclass(eq=False, slots=True)
class _Flight:
    """A request on its way."""

    request: Request
    future: "Future[Done]"
    hear: OnTokens | None
    name: str = ""
    deaths: int = 0
    alone: int = 0  # of these with nobody else in the loop


class Engine:
    """Answers requests; thread-safe.

    Args:
        model: a causal language model of transformers, loaded and on its device.
        hopeless: called once with the reason when the engine cannot go on: a CUDA error, or no memory even for small
            batches. What is in hand then fails with EngineDown.
        batching: makes the loop; `testing.slots` has one without a model.

    Raises:
        MemoryError, ValueError: the device has no room for a cache of this shape.
    """

    def __init__(
        self, model: Any, shape: Shape | None = None, *, on_fatal: Callable[[Exception], None] | None = None,
        batching: Callable[[Any, Shape, Sampler], Any] = Batching,
    ) -> None:  # fmt: skip
        self._make_batching = batching
        self._model, self._shape, self._on_fatal = model, shape or Shape(), on_fatal
        self._names = itertools.count()
        self._lock = threading.RLock()
        self._flights: dict[str, _Flight] = {}  # in the loop
        self._parked: deque[_Flight] = deque()  # handed in while suspects are tried
        self._apart: deque[list[_Flight]] = deque()  # groups of suspects still to be tried, each alone in the loop
        self._deaths = self._halved = 0
        self._need = DemandEstimate()
        self._since_s = time.monotonic()  # since when there has been work without a break
        self._made_anew_s = 0.0  # since when a dead loop is being made anew, while it is
        self._down: Exception | None = None
        self._closed = False
        self._sampler = Sampler()
        self._batching: Batching = batching(model, self._shape, self._sampler)
        self._batching.start()
        self.room: Room = self._batching.room()
        self._dispatcher = threading.Thread(target=self._dispatch, daemon=True, name="agentmesh-dispatcher")
        self._dispatcher.start()
        atexit.register(self.close)  # an interpreter that ends under a running loop may abort

    # ---- for everybody -------------------------------------------------------------------------
    def submit(self, request: Request, hear: OnTokens | None = None) -> "Future[Done]":
        """The answer, later; cancelling the future frees its place in the batch.

        Args:
            hear: called on the engine's dispatcher after each step with all tokens so far.

        Raises:
            ContextTooLong, ModelError: it can never fit, and why.
            EngineDown: the engine is closed or cannot go on.
        """
        self.room.check(request)
        flight = _Flight(request, Future(), hear)
        with self._lock:
            if not self._flights:
                self._since_s = time.monotonic()
            if self._down is not None or self._closed:
                raise EngineDown(str(self._down or "the engine is closed"))
            self._need.came(request)
            if self._apart or any(f.deaths >= RETRIES_TOGETHER for f in self._flights.values()):
                self._parked.append(flight)
            else:
                self._launch(flight)
        flight.future.add_done_callback(lambda future: self._on_cancelled(flight) if future.cancelled() else None)
        return flight.future

    @property
    def gauge(self) -> Gauge:
        """How it stands."""
        with self._lock:
            gauge = self._batching.gauge(self._deaths)
            waiting = gauge.waiting + len(self._parked) + sum(map(len, self._apart))
            idle, most = not (self._flights or self._parked or self._apart), self._batching.shape.batch_tokens
            return replace(gauge, waiting=waiting, idle=idle, batch_tokens=most)

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the machine's processor."""
        return bool(self._model.device.type == "cpu")

    @property
    def memory(self) -> Memory:
        """What its device holds."""
        return memory_of(self._model.device)

    def admits(self, in_hand: int) -> int:
        """How many more requests there is room for; one always, where there are none.

        Args:
            in_hand: requests that are in the engine or on their way to it.
        """
        gauge, need = self.gauge, max(1.0, self._need.tokens / self.room.page_tokens)
        taken = max(gauge.pages - gauge.free_pages, in_hand * need)
        more = min(int((gauge.pages - taken) / need), self._batching.shape.batch_requests - in_hand)
        return max(more, 0 if in_hand else 1)

    @property
    def hung_s(self) -> float:
        """For how long it has had work and made no step, or its device has been in the hands of one batch of an encoder."""
        now_s, busy = time.monotonic(), bool(self._flights or self._parked or self._apart)
        since_s = max(self._batching.stepped_s, self._since_s) if busy else now_s
        # without the lock: whoever makes the loop anew has it, and may hang there
        return max(self._batching.held_s, now_s - min(since_s, self._made_anew_s or now_s))

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._down is None and not self._closed

    def close(self) -> None:
        """Stop; what is in hand fails with EngineDown."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            batching = self._batching
        atexit.unregister(self.close)
        batching.end()
        if threading.current_thread() is not self._dispatcher:
            self._dispatcher.join()
        self._fail_all(EngineDown("the engine was closed"))

    # ---- under the lock ------------------------------------------------------------------------
    def _launch(self, flight: _Flight) -> None:
        if flight.future.done():
            return
        flight.name = f"r{next(self._names)}"
        self._flights[flight.name] = flight
        self._sampler.add(flight.name, flight.request)
        request = flight.request
        self._batching.begin(
            flight.name, request.tokens, request.most_tokens, sorted(request.ends), tell=flight.hear is not None
        )  # refused: the loop is dead, and the dispatcher takes up all flights when it sees that

    def _on_cancelled(self, flight: _Flight) -> None:
        """Nobody waits any more."""
        with self._lock:
            if self._flights.pop(flight.name, None) is not None:
                self._batching.cancel_request(flight.name)
                self._sampler.forget(flight.name)
                self._next_group()

    def _next_group(self) -> None:
        """When the loop is empty: the next suspects, or everybody who waited for them."""
        while not self._flights and self._apart:
            for flight in self._apart.popleft():
                self._launch(flight)
        if not self._apart and not any(f.deaths >= RETRIES_TOGETHER for f in self._flights.values()):
            while self._parked:
                self._launch(self._parked.popleft())

    # ---- the dispatcher ------------------------------------------------------------------------
    def _dispatch(self) -> None:
        try:
            self._deliver()
        except Exception as e:  # nobody would ever hear of anything again
            log.exception("the engine's dispatcher failed")
            self._fail(e, [])

    def _deliver(self) -> None:
        while not self._closed and self._down is None:
            batching, alive = self._batching, self._batching.is_running()  # asked first: the last words are heard too
            for output in batching.outputs(DISPATCH_WAIT_S if alive else 0.0):
                if output.error is None:
                    self._on_output(output)
            if not alive and not self._closed:
                self._revive(batching.error)

    def _on_output(self, output: Any) -> None:
        flight = self._flights.get(output.request_id)
        if flight is None:
            return
        tokens, over = output.generated_tokens, output.is_finished()
        ended = bool(tokens) and tokens[-1] in flight.request.ends
        said = tuple(tokens[:-1] if ended else tokens)
        enough = False
        if flight.hear is not None:
            try:
                enough = flight.hear(said)
            except Exception as e:
                self._resolve(flight, e, over=over)
                return
        if over or enough:
            self._resolve(flight, said, over=over, finish="stop" if ended or enough else "length")

    def _resolve(self, flight: _Flight, what: Any, *, over: bool, finish: Any = "stop") -> None:
        with self._lock:
            if self._flights.pop(flight.name, None) is None:
                return
            if not over:
                self._batching.cancel_request(flight.name)
            cached, batch, logprobs = self._sampler.forget(flight.name)
            if not isinstance(what, Exception):
                self._need.ended(flight.request, cached_tokens=cached, answer_tokens=len(what))
            self._next_group()
        if isinstance(what, Exception):
            _set_result(flight.future, error=what)
        else:
            _set_result(flight.future, Done(what, finish, logprobs[: len(what)], cached, batch))

    # ---- after a death -------------------------------------------------------------------------
    def _revive(self, error: Exception) -> None:
        """The loop is dead: make another, and let its requests begin again."""
        with self._lock:
            self._deaths += 1
            victims = [f for f in self._flights.values() if not f.future.done()]
            self._flights.clear()
            for flight in victims:
                self._sampler.forget(flight.name)
            no_memory = isinstance(error, torch.OutOfMemoryError)
            log.warning(
                "the engine's loop ended with %d requests in it: %s: %s", len(victims), type(error).__name__, error
            )
            culprit: _Flight | None = None
            if no_memory and self._halved < HALVINGS:
                self._halved += 1
                self._shape = replace(self._batching.shape, batch_tokens=max(1, self._batching.shape.batch_tokens // 2))
                log.warning("batches have at most %d tokens from now on", self._shape.batch_tokens)
                self._apart.appendleft(victims)
            elif breaks_device(error) or (no_memory and self._on_fatal is not None):
                self._fail(error, victims)
                return
            elif len(victims) == 1 and victims[0].alone + 1 >= RETRIES_ALONE:
                culprit = victims[0]
            else:
                self._apart.extendleft(reversed(_groups(victims)))
            self._made_anew_s = time.monotonic()
            try:
                self._batching.end()
                self._batching = self._make_batching(self._model, self._shape, self._sampler)
                self._batching.start()
                self.room = self._batching.room()
            except Exception as e:
                self._fail(e, victims)
                return
            finally:
                self._made_anew_s = 0.0
            self._next_group()
        if culprit is not None:
            kind = GpuOutOfMemory if no_memory else ModelError
            tokens = len(culprit.request.tokens)
            _set_result(culprit.future, error=kind(
                f"this request of {tokens} + {culprit.request.most_tokens} tokens crashes the engine's loop, alone as in "
                f"company ({type(error).__name__}: {error}); send another prompt, or a shorter one"
            ))  # fmt: skip

    def _fail(self, error: Exception, victims: list[_Flight]) -> None:
        self._down = error.with_traceback(None)  # its frames would hold the cache
        log.error("the engine cannot go on: %s: %s", type(error).__name__, error)
        if self._on_fatal is not None:
            # before anybody hears of it: a worker that leaves now gives its steps back whole
            self._on_fatal(error)
        for flight in victims:
            _set_result(flight.future, error=EngineDown(f"{type(error).__name__}: {error}"))
        self._fail_all(EngineDown(f"{type(error).__name__}: {error}"))

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            left = [*self._flights.values(), *self._parked, *itertools.chain.from_iterable(self._apart)]
            self._flights.clear()
            self._parked.clear()
            self._apart.clear()
        for flight in left:
            _set_result(flight.future, error=error)


def _groups(victims: list[_Flight]) -> list[list[_Flight]]:
    """How those who were in a dead loop are tried again: together after the first death, then in halves."""
    for flight in victims:
        flight.deaths += 1
        flight.alone += len(victims) == 1
    again = [f for f in victims if f.deaths >= RETRIES_TOGETHER]
    fresh = [f for f in victims if f.deaths < RETRIES_TOGETHER]
    half = -(-len(again) // 2)
    return [group for group in (again[:half], again[half:], fresh) if group]


def _set_result(future: "Future[Done]", answer: Done | None = None, *, error: Exception | None = None) -> None:
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    elif answer is not None:
        future.set_result(answer)
