"""Executes one step: calls its function, or asks a model. The outcome is always an event, never an exception."""

import asyncio
import contextvars
import inspect
import random
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from agentmesh.definitions.step import RUNNING_INSIDE, Ask, Step, StepPolicy, ToolContext
from agentmesh.definitions.tool import NotDone, Unknown
from agentmesh.errors import (
    ConfigError,
    MeshError,
    ModelError,
    StepError,
    StepTimeout,
    ToolError,
    TryAgain,
    error_to_json,
    well_formed,
)
from agentmesh.journal.events import Event, StepDone, StepFailed, StepInDoubt, StepRetried
from agentmesh.journal.types import original_run_id
from agentmesh.message import Message, ToolCall
from agentmesh.model import Answer, Model, Prompt, RetryLater, model_name
from agentmesh.schema import canonical

# `def` tools on threads of this process, also those that timed out: a thread cannot be stopped.
RUNNING_THREADS: set[object] = set()
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 60.0
# before the servers of a queue are asked again, when none is reachable
FIRST_UNAVAILABLE_S, MAX_UNAVAILABLE_S = 4.0, 30.0
Charge = dict[str, float]


@dataclass(slots=True)
class Attempt:
    """One attempt at one step, as its executor sees it."""

    run_id: str
    n: int
    number: int
    in_doubt: bool = False
    cancelled: Callable[[], bool] = field(default=lambda: False)
    progress: Callable[[str], None] = field(default=lambda text: None)
    on_token: Callable[[str], None] | None = None
    agent: str = ""
    trace: str = ""
    away_ms: Sequence[int] = ()  # how long the attempts waited that are not counted against `retries`

    @property
    def key(self) -> str:
        """The step's key, the same in every attempt, those of the run's retries included."""
        return f"{original_run_id(self.run_id)}/{self.n}"


class StepExecutor(Protocol):
    """What the engine needs to execute steps."""

    async def do(self, step: Step[Any], at: Attempt) -> tuple[Event, Charge]:
        """The step's end, or StepRetried or StepInDoubt; and what it cost."""
        ...


class LocalExecutor:
    """Executes steps of both targets: calls their function, or asks a model.

    Args:
        model_of: `provider:name` or an object, to a Model and the name it knows.
        threads: how many `def` tools run at once in this process.
        servers_of: the model servers that a step's queue names, or None; `model_of` takes them in a model's place.
        executor: runs `def` tools instead, where `threading` is patched.
    """

    def __init__(
        self, *, model_of: Callable[[Any], tuple[Model, str]], model: Any, deps: Any = None, threads: int = 64,
        executor: Executor | None = None, servers_of: Callable[[Ask], Any] = lambda step: None,
    ) -> None:  # fmt: skip
        self._servers_of = servers_of
        self._model_of, self._model, self._deps = model_of, model, deps
        self._targets: dict[str, Callable[[Any, Attempt], Awaitable[tuple[Event, Charge]]]] = {
            "model": self._ask_model,
            "function": self._call_function,
        }
        self._threads = executor or ThreadPoolExecutor(threads, thread_name_prefix="agentmesh-tool")

    async def do(self, step: Step[Any], at: Attempt) -> tuple[Event, Charge]:
        """The step's end, or StepRetried or StepInDoubt; and what it cost."""
        return await self._targets[step.target](step, at)

    def close(self) -> None:
        """Give up the threads; a tool that still runs is abandoned."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- models --------------------------------------------------------------------------------
    async def _ask_model(self, step: Ask, at: Attempt) -> tuple[Event, Charge]:
        servers, limit = None, None
        try:
            model_source, servers = step.model or self._model, self._servers_of(step)
            model, name = self._model_of(servers or model_source)
            if servers:
                name = str(model_source).partition(":")[2]
            prompt = Prompt(name, step.messages, step.tools, step.output, step.options)
            async with asyncio.timeout(step.timeout_s) as limit:
                answer: Answer = await model.ask(prompt, at.on_token)
            if not isinstance(answer, Answer):
                raise TypeError(f"its `ask` gives a {type(answer).__name__}, not an Answer")
        except RetryLater as e:
            if e.away and servers and sum(at.away_ms) < 1000 * servers.unavailable_timeout_s:
                return self._retry_when_available(at, e.error), {}
            return self._retry_or_fail(step, at, e.error, step.retries, e.after_s), {}
        except StepError as e:
            return self._failed(step, at, e), {}
        except ConfigError as e:
            return self._failed(step, at, ModelError(e.message, hint=e.hint)), {}
        except Exception as e:
            if limit is not None and limit.expired():
                late = StepTimeout(f"model call of `{step.name}` timed out after {step.timeout_s} s")
                return self._retry_or_fail(step, at, late, step.retries), {}
            error = ModelError(
                f"the model of `{step.name}` raised {type(e).__name__}: {e}"
            )  # a timeout of its own, too
            return self._retry_or_fail(step, at, error, step.retries), {}
        usage = answer.usage
        cut = "length" if answer.finish == "length" else ""
        done = StepDone(
            n=at.n, value=_well_formed(answer.message).to_json(), usage=usage.to_json(), attempt=at.number, finish=cut,
            model=model_name(model_source),
        )  # fmt: skip
        return done, {"turns": 1, "tokens": usage.tokens, "usd": usage.cost_usd}

    # ---- functions: tools, and what other kinds of steps bind -----------------------------------
    async def _call_function(self, step: Step[Any], at: Attempt) -> tuple[Event, Charge]:
        policy = step.policy()
        if at.in_doubt and policy.reconcile is not None:
            reconciled = await self._reconcile(step, policy, at)
            if reconciled is not None:
                return reconciled, {}
        context = ToolContext(at.key, at.number, at.run_id, self._deps, at.cancelled, at.progress)
        limit = None
        try:
            async with asyncio.timeout(policy.timeout_s) as limit:
                value = await self._run(step.bind(context), step.label)
        except TryAgain as e:
            return self._failed(step, at, ToolError(str(e), again=True)), {}
        except RetryLater as e:
            error = step.error(f"{step.label} raised {getattr(e.error, 'message', e.error)}")
            return self._retry_or_fail(step, at, error, policy.retries, e.after_s), {}
        except Exception as e:
            if limit is not None and limit.expired():
                late = StepTimeout(f"{step.label} timed out after {policy.timeout_s} s")
                return self._retry_or_fail(step, at, late, policy.retries), {}
            message = str(e) if isinstance(e, MeshError) else f"{type(e).__name__}: {e}"
            return self._retry_or_fail(step, at, step.error(f"{step.label} raised {message}"), policy.retries), {}
        return self._returned(step, policy, at, value), {}

    async def _run(self, call: Callable[[], Any], label: str) -> Any:
        """Run a `def` on a thread, an `async def` on this loop, both with RUNNING_INSIDE set."""
        token = RUNNING_INSIDE.set(label)
        try:
            if inspect.iscoroutinefunction(getattr(call, "func", call)):
                return await call()
            context = contextvars.copy_context()
            value = await asyncio.get_running_loop().run_in_executor(self._threads, context.run, _run_counted, call)
            return await value if inspect.isawaitable(value) else value
        finally:
            RUNNING_INSIDE.reset(token)

    async def _reconcile(self, step: Step[Any], policy: StepPolicy, at: Attempt) -> Event | None:
        """What `reconcile` says of the attempt that was cut off; None: it did not happen."""
        reconcile = policy.reconcile
        assert reconcile is not None
        try:
            outcome = await self._run(lambda: reconcile(at.key), step.label)
        except Exception:
            return StepInDoubt(n=at.n, attempt=at.number)
        if outcome is NotDone or isinstance(outcome, NotDone):
            return None
        if outcome is Unknown or isinstance(outcome, Unknown):
            return StepInDoubt(n=at.n, attempt=at.number)
        return self._returned(step, policy, at, outcome)

    def _returned(self, step: Step[Any], policy: StepPolicy, at: Attempt, value: Any) -> Event:
        try:
            plain = step.encode(value)
        except TypeError as e:
            return self._failed(step, at, step.error(f"{step.label} returned {e}"))
        most = policy.max_output_bytes
        if isinstance(plain, str):
            plain = truncate_middle(plain, most)
        elif (size := len(canonical(plain).encode())) > most:
            return self._failed(step, at, step.error(
                f"{step.label} returned {size} bytes of JSON and max_output_bytes is {most}",
                hint="return less, or raise it",
            ))  # fmt: skip
        return StepDone(n=at.n, value=plain, attempt=at.number)

    # ---- ends ----------------------------------------------------------------------------------
    def _failed(self, step: Step[Any], at: Attempt, error: StepError) -> Event:
        where = error.with_fields(run_id=at.run_id, n=at.n, name=step.name, attempts=at.number)
        return StepFailed(n=at.n, error=error_to_json(where), attempt=at.number)

    def _retry_or_fail(
        self, step: Step[Any], at: Attempt, error: Exception, retries: int, after_s: float | None = None
    ) -> Event:
        """StepRetried after an exponential back-off with full jitter, or StepFailed when the retries are used up."""
        if at.number - len(at.away_ms) > retries:
            final = error if isinstance(error, StepError) else ModelError(str(error))
            return self._failed(step, at, final)
        if after_s is None:
            after_s = random.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**at.number))
        return StepRetried(n=at.n, error=error_to_json(error), attempt=at.number, after_ms=round(after_s * 1000))

    def _retry_when_available(self, at: Attempt, error: Exception) -> Event:
        """Another attempt later, because no server is reachable; at random times, so that not all come back at once."""
        most_s = min(MAX_UNAVAILABLE_S, FIRST_UNAVAILABLE_S * 2 ** len(at.away_ms))
        after_ms = round(1000 * random.uniform(most_s / 2, most_s))
        return StepRetried(n=at.n, error=error_to_json(error), attempt=at.number, after_ms=after_ms, away=True)


def _run_counted(call: Callable[[], Any]) -> Any:
    mark = object()
    RUNNING_THREADS.add(mark)
    try:
        return call()
    finally:
        RUNNING_THREADS.discard(mark)


def _well_formed(message: Message) -> Message:
    """A model's message as the journal can have it."""
    calls = tuple(ToolCall(*map(well_formed, (c.id, c.name, c.arguments))) for c in message.tool_calls)
    return replace(message, text=well_formed(message.text), tool_calls=calls)


def truncate_middle(text: str, most_bytes: int) -> str:
    """The text in at most so many bytes of UTF-8: its head and tail, and between them how much was omitted."""
    raw = text.encode()
    if len(raw) <= most_bytes:
        return text
    half = max(1, most_bytes // 2 - 64)
    omitted = len(raw) - 2 * half
    return f"{raw[:half].decode(errors='ignore')}\n[… {omitted} bytes omitted …]\n{raw[-half:].decode(errors='ignore')}"
