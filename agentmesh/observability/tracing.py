"""OpenTelemetry spans with the GenAI names: one trace a run, whatever processes and hosts work on it.

Imports nothing of OpenTelemetry: a process that has no SDK pays a look at sys.modules a step. Ids are hashes of run ids,
so neither messages nor the journal carry a context (docs/decisions/0008-one-trace-a-run.md).

Source: Semantic conventions for generative AI, version 1.41.0, docs/gen-ai (status: development).
"""

import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from agentmesh.definitions.step import Step
from agentmesh.engine.executor import Attempt
from agentmesh.engine.replay import History
from agentmesh.journal.events import Event, RunFailed, StepDone, StepFailed, StepRetried
from agentmesh.observability.observer import OnStepEnd

SCHEMA = "https://opentelemetry.io/schemas/1.41.0"
LONGEST_MESSAGE = 500
_NEXT_IDS: ContextVar[tuple[int, int]] = ContextVar("agentmesh_span_ids", default=(0, 0))


def trace_id(run_id: str) -> int:
    """The trace of a run's tree."""
    return int.from_bytes(_hash(f"trace {run_id.partition('/')[0]}")[:16])


def span_id(run_id: str, n: int = 0, attempt: int = 0) -> int:
    """The span of a run, or of an attempt at one of its steps."""
    return int.from_bytes(_hash(f"span {run_id} {n} {attempt}")[:8])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def current_traceparent() -> str:
    """The caller's span as a W3C traceparent, for a run begun under it; empty where there is none."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None or not hasattr(api, "get_current_span"):
        return ""
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"


class _Ids:
    """The id generator of our own tracer, and of no other: gives the ids of `_NEXT_IDS`."""

    def generate_trace_id(self) -> int:
        return _NEXT_IDS.get()[0]

    def generate_span_id(self) -> int:
        return _NEXT_IDS.get()[1]

    def is_trace_id_random(self) -> bool:
        return False


class TracingObserver:
    """An observer that makes spans where this process has set up OpenTelemetry's SDK; elsewhere it does nothing."""

    def __init__(self) -> None:
        self._tracer: Any = None

    def step(self, step: Step[Any], at: Attempt, model: str) -> Any:
        """See Observer. The attempt's span is the current one for whatever the tool or the model's client does."""
        api: Any = sys.modules.get("opentelemetry.trace")
        if api is None or not self._ready(api):
            return None
        return self._attempt(api, step, at, model)

    def ended(self, history: History, end: Event) -> None:
        """See Observer. A run's span is made at its end, from the time its journal says that it began."""
        api: Any = sys.modules.get("opentelemetry.trace")
        started = history.started
        if api is None or started is None or not self._ready(api):
            return
        run_id = history.run_id
        attributes = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": started.agent, **_of_run(run_id)}
        now = time.time_ns()
        span = self._start(
            api, f"invoke_agent {started.agent}", self._above(api, run_id, started.trace), (run_id, 0, 0),
            attributes, kind=api.SpanKind.INTERNAL, start_time=min(now, started.at_ms * 1_000_000) or now,
        )  # fmt: skip
        if isinstance(end, RunFailed):
            _fail(api, span, end.error)
        span.end(now)

    # ---- parts ---------------------------------------------------------------------------------
    def _ready(self, api: Any) -> bool:
        if self._tracer is not None:
            return True
        if not hasattr(api, "get_tracer_provider") or not hasattr(api.get_tracer_provider(), "id_generator"):
            return False  # half imported, or the API alone, which makes no ids
        tracer = api.get_tracer("agentmesh", schema_url=SCHEMA)
        if not hasattr(tracer, "id_generator"):
            return False
        tracer.id_generator = _Ids()
        self._tracer = tracer
        return True

    @contextmanager
    def _attempt(self, api: Any, step: Step[Any], at: Attempt, model: str) -> Iterator[OnStepEnd]:
        parent = self._context(api, at.run_id, at.trace, span_id(at.run_id))
        name, kind, attributes = _described(api, step, at, model)
        attributes |= {"agentmesh.step": at.n, "agentmesh.attempt": at.number, **_of_run(at.run_id)}
        span = self._start(api, name, parent, (at.run_id, at.n, at.number), attributes, kind=kind)

        def on_end(event: Event) -> None:
            if isinstance(event, StepFailed | StepRetried):
                _fail(api, span, event.error)
            elif isinstance(event, StepDone) and event.usage:
                span.set_attribute("gen_ai.usage.input_tokens", int(event.usage.get("in", 0)))
                span.set_attribute("gen_ai.usage.output_tokens", int(event.usage.get("out", 0)))

        with api.use_span(span, end_on_exit=True):
            try:
                yield on_end
            except BaseException:  # cancelled: the lease was lost, the run was cancelled, or the worker stops
                span.set_attribute("error.type", "cancelled")
                raise

    def _start(self, api: Any, name: str, parent: Any, ids: tuple[str, int, int], attributes: Any, **how: Any) -> Any:
        token = _NEXT_IDS.set((trace_id(ids[0]), span_id(*ids)))
        try:
            return self._tracer.start_span(name, parent, attributes=attributes, **how)
        finally:
            _NEXT_IDS.reset(token)

    def _above(self, api: Any, run_id: str, trace: str) -> Any:
        """The parent context of a run's own span: its parent run's, the caller's, or none."""
        parent = run_id.rpartition("/")[0]
        if parent:
            return self._context(api, run_id, trace, span_id(parent))
        if trace:
            return self._context(api, run_id, trace, int(trace.split("-")[2], 16))
        return api.set_span_in_context(api.INVALID_SPAN)

    def _context(self, api: Any, run_id: str, trace: str, parent: int) -> Any:
        """A context in the run's trace, below a span that some process made or will make."""
        if trace:
            _, of, _, flags = trace.split("-")
            ours, sampled = int(of, 16), int(flags, 16) & 1
        else:  # the sampler answers alike for one trace in every process
            ours = trace_id(run_id)
            sampled = self._tracer.sampler.should_sample(None, ours, "invoke_agent").decision.is_sampled()
        flags = api.TraceFlags(api.TraceFlags.SAMPLED if sampled else api.TraceFlags.DEFAULT)
        return api.set_span_in_context(api.NonRecordingSpan(api.SpanContext(ours, parent, True, flags)))


def _described(api: Any, step: Step[Any], at: Attempt, model: str) -> tuple[str, Any, dict[str, Any]]:
    """An attempt's name, kind and attributes, in the conventions' words."""
    attributes: dict[str, Any] = {"gen_ai.agent.name": at.agent}
    if step.target == "model":
        provider, _, name = model.rpartition(":")
        attributes |= {"gen_ai.operation.name": "chat", "gen_ai.request.model": name}
        attributes["gen_ai.provider.name"] = provider or "custom"
        kind = api.SpanKind.INTERNAL if provider in ("", "local") else api.SpanKind.CLIENT
        return f"chat {name}", kind, attributes
    attributes |= {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": step.name}
    attributes["gen_ai.tool.type"] = "function"
    return f"execute_tool {step.name}", api.SpanKind.INTERNAL, attributes


def _of_run(run_id: str) -> dict[str, str]:
    return {"agentmesh.run": run_id, "gen_ai.conversation.id": run_id.partition("/")[0]}


def _fail(api: Any, span: Any, error: Any) -> None:
    span.set_attribute("error.type", str(error.get("type", "_OTHER")))
    span.set_status(api.Status(api.StatusCode.ERROR, str(error.get("message", ""))[:LONGEST_MESSAGE]))
