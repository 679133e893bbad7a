"""Many prompts, one model, shared batches: transformers' continuous batching behind a guard that makes it safe to share.

The library's loop ends at any exception, and every request in it is lost. Here a new loop is started and its requests begin
again from their prompts; requests that were in two dead loops are tried in halves, so that only the culprit fails.
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
from agentmesh.inference.request import DemandEstimate, Done, EngineDown, Gauge, InferenceRequest, Room
from agentmesh.inference.sampling import Sampler

log = logging.getLogger("agentmesh.gpu")

MAX_HALVINGS = 2  # of the tokens of a batch, when the device has no memory for it
DISPATCH_WAIT_S = 0.2  # how long the dispatcher waits for an output before it checks that the loop is alive
DEATHS_TOGETHER = 2  # of loops that a request was in, before it is tried apart from the others
DEATHS_ALONE = 2  # of loops with one request in it, before that one is to blame: the first may have had another cause

# Gets the answer's tokens so far; the answer ends there when it returns True.
OnTokens = Callable[[Sequence[int]], bool]


@dataclass(eq=False, slots=True)
class _Flight:
    """A request in flight.

    Args:
        deaths: of loops that it was in.
        deaths_alone: those of them with no other request in the loop.
    """

    request: InferenceRequest
    future: "Future[Done]"
    on_tokens: OnTokens | None
    name: str = ""
    deaths: int = 0
    deaths_alone: int = 0


class InferenceEngine:
    """Answers requests; thread-safe.

    Args:
        model: a causal language model of transformers, loaded and on its device.
        on_fatal: called once with the reason when the engine cannot continue: a CUDA error, or no memory even for small
            batches. What is in flight then fails with EngineDown.
        batching: makes the loop; `testing.slot_engine` has one without a model.

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
        self._parked: deque[_Flight] = deque()  # submitted while suspects are tried
        self._suspects: deque[list[_Flight]] = deque()  # groups to be tried one after the other
        self._deaths = self._halved = 0
        self._demand = DemandEstimate()
        self._busy_since_s = time.monotonic()  # since when there has been work without a break
        self._restarting_since_s = 0.0  # 0 while no dead loop is being replaced
        self._fatal_error: Exception | None = None
        self._closed = False
        self._sampler = Sampler()
        self._batching: Batching = batching(model, self._shape, self._sampler)
        self._batching.start()
        self.room: Room = self._batching.room()
        self._dispatcher = threading.Thread(target=self._dispatch, daemon=True, name="agentmesh-dispatcher")
        self._dispatcher.start()
        atexit.register(self.close)  # an interpreter that ends under a running loop may abort

    # ---- from any thread -----------------------------------------------------------------------
    def submit(self, request: InferenceRequest, on_tokens: OnTokens | None = None) -> "Future[Done]":
        """A future of the answer; cancelling it frees the request's place in the batch.

        Args:
            on_tokens: called on the engine's dispatcher after each step with all tokens so far.

        Raises:
            ContextTooLong, ModelError: it can never fit, and why.
            EngineDown: the engine is closed or cannot continue.
        """
        self.room.check(request)
        flight = _Flight(request, Future(), on_tokens)
        with self._lock:
            if not self._flights:
                self._busy_since_s = time.monotonic()
            if self._fatal_error is not None or self._closed:
                raise EngineDown(str(self._fatal_error or "the engine is closed"))
            self._demand.arrived(request)
            if self._suspects or any(f.deaths >= DEATHS_TOGETHER for f in self._flights.values()):
                self._parked.append(flight)
            else:
                self._launch(flight)
        flight.future.add_done_callback(lambda future: self._on_cancelled(flight) if future.cancelled() else None)
        return flight.future

    @property
    def gauge(self) -> Gauge:
        """The engine's state and counts."""
        with self._lock:
            gauge = self._batching.gauge(self._deaths)
            waiting = gauge.waiting + len(self._parked) + sum(map(len, self._suspects))
            idle, most = not (self._flights or self._parked or self._suspects), self._batching.shape.batch_tokens
            return replace(gauge, waiting=waiting, idle=idle, batch_tokens=most)

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the machine's processor."""
        return bool(self._model.device.type == "cpu")

    @property
    def memory(self) -> Memory:
        """What its device holds."""
        return memory_of(self._model.device)

    def admits(self, in_flight: int) -> int:
        """How many more requests there is room for; at least one where there are none.

        Args:
            in_flight: requests that are in the engine or about to be submitted.
        """
        gauge, pages_each = self.gauge, max(1.0, self._demand.tokens / self.room.page_tokens)
        taken = max(gauge.pages - gauge.free_pages, in_flight * pages_each)
        more = min(int((gauge.pages - taken) / pages_each), self._batching.shape.batch_requests - in_flight)
        return max(more, 0 if in_flight else 1)

    @property
    def hung_s(self) -> float:
        """Seconds for which it has had work and made no step, or for which one batch of an encoder has held the device."""
        now_s, busy = time.monotonic(), bool(self._flights or self._parked or self._suspects)
        since_s = max(self._batching.stepped_s, self._busy_since_s) if busy else now_s
        # without the lock: the thread that replaces a loop holds it, and may hang there
        return max(self._batching.held_s, now_s - min(since_s, self._restarting_since_s or now_s))

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._fatal_error is None and not self._closed

    def close(self) -> None:
        """Stop; what is in flight fails with EngineDown."""
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
            flight.name, request.tokens, request.most_tokens, sorted(request.ends), tell=flight.on_tokens is not None
        )  # a dead loop refuses it: the dispatcher finds it among the flights when it replaces the loop

    def _on_cancelled(self, flight: _Flight) -> None:
        """The caller has cancelled the future."""
        with self._lock:
            if self._flights.pop(flight.name, None) is not None:
                self._batching.cancel_request(flight.name)
                self._sampler.forget(flight.name)
                self._next_group()

    def _next_group(self) -> None:
        """When the loop is empty: launch the next suspects, or all that was submitted while they were tried."""
        while not self._flights and self._suspects:
            for flight in self._suspects.popleft():
                self._launch(flight)
        if not self._suspects and not any(f.deaths >= DEATHS_TOGETHER for f in self._flights.values()):
            while self._parked:
                self._launch(self._parked.popleft())

    # ---- the dispatcher ------------------------------------------------------------------------
    def _dispatch(self) -> None:
        try:
            self._deliver()
        except Exception as e:  # without this thread no future is ever resolved
            log.exception("the engine's dispatcher failed")
            self._fail(e, [])

    def _deliver(self) -> None:
        while not self._closed and self._fatal_error is None:
            batching, alive = self._batching, self._batching.is_running()  # before its outputs, so that none is missed
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
        answer = tuple(tokens[:-1] if ended else tokens)
        enough = False
        if flight.on_tokens is not None:
            try:
                enough = flight.on_tokens(answer)
            except Exception as e:
                self._resolve(flight, e, over=over)
                return
        if over or enough:
            self._resolve(flight, answer, over=over, finish="stop" if ended or enough else "length")

    def _resolve(self, flight: _Flight, outcome: Any, *, over: bool, finish: Any = "stop") -> None:
        """End a request, with its tokens or an exception.

        Args:
            over: the loop has ended it too.
        """
        with self._lock:
            if self._flights.pop(flight.name, None) is None:
                return
            if not over:
                self._batching.cancel_request(flight.name)
            cached, batch, logprobs = self._sampler.forget(flight.name)
            if not isinstance(outcome, Exception):
                self._demand.ended(flight.request, cached_tokens=cached, answer_tokens=len(outcome))
            self._next_group()
        if isinstance(outcome, Exception):
            _set_result(flight.future, error=outcome)
        else:
            _set_result(flight.future, Done(outcome, finish, logprobs[: len(outcome)], cached, batch))

    # ---- after a death -------------------------------------------------------------------------
    def _revive(self, error: Exception) -> None:
        """Replace the dead loop, and let its requests begin again."""
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
            if no_memory and self._halved < MAX_HALVINGS:
                self._halved += 1
                self._shape = replace(self._batching.shape, batch_tokens=max(1, self._batching.shape.batch_tokens // 2))
                log.warning("batches have at most %d tokens from now on", self._shape.batch_tokens)
                self._suspects.appendleft(victims)
            elif breaks_device(error) or (no_memory and self._on_fatal is not None):
                self._fail(error, victims)
                return
            elif len(victims) == 1 and victims[0].deaths_alone + 1 >= DEATHS_ALONE:
                culprit = victims[0]
            else:
                self._suspects.extendleft(reversed(_suspect_groups(victims)))
            self._restarting_since_s = time.monotonic()
            try:
                self._batching.end()
                self._batching = self._make_batching(self._model, self._shape, self._sampler)
                self._batching.start()
                self.room = self._batching.room()
            except Exception as e:
                self._fail(e, victims)
                return
            finally:
                self._restarting_since_s = 0.0
            self._next_group()
        if culprit is not None:
            kind = GpuOutOfMemory if no_memory else ModelError
            tokens = len(culprit.request.tokens)
            _set_result(culprit.future, error=kind(
                f"this request of {tokens} + {culprit.request.most_tokens} tokens crashes the engine's loop, alone and "
                f"among others ({type(error).__name__}: {error})", hint="send another prompt, or a shorter one",
            ))  # fmt: skip

    def _fail(self, error: Exception, victims: list[_Flight]) -> None:
        self._fatal_error = error.with_traceback(None)  # its frames would hold the cache
        log.error("the engine cannot continue: %s: %s", type(error).__name__, error)
        if self._on_fatal is not None:
            # before the futures fail: a worker that leaves now releases its steps as they were
            self._on_fatal(error)
        for flight in victims:
            _set_result(flight.future, error=EngineDown(f"{type(error).__name__}: {error}"))
        self._fail_all(EngineDown(f"{type(error).__name__}: {error}"))

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            left = [*self._flights.values(), *self._parked, *itertools.chain.from_iterable(self._suspects)]
            self._flights.clear()
            self._parked.clear()
            self._suspects.clear()
        for flight in left:
            _set_result(flight.future, error=error)


def _suspect_groups(victims: list[_Flight]) -> list[list[_Flight]]:
    """The requests of a dead loop as they are tried again: together after the first death, then in halves."""
    for flight in victims:
        flight.deaths += 1
        flight.deaths_alone += len(victims) == 1
    suspects = [f for f in victims if f.deaths >= DEATHS_TOGETHER]
    fresh = [f for f in victims if f.deaths < DEATHS_TOGETHER]
    half = -(-len(suspects) // 2)
    return [group for group in (suspects[:half], suspects[half:], fresh) if group]


def _set_result(future: "Future[Done]", answer: Done | None = None, *, error: Exception | None = None) -> None:
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    elif answer is not None:
        future.set_result(answer)
