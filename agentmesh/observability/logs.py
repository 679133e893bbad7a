"""Log lines that say which run, step and attempt they belong to: text for people, one JSON object a line for machines."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

from agentmesh.definitions.step import Step
from agentmesh.engine.executor import Attempt
from agentmesh.engine.replay import History
from agentmesh.journal.events import Event, StepFailed, StepRetried
from agentmesh.observability.observer import OnStepEnd

Form = Literal["text", "json"]
# These log every message they carry; only their warnings are wanted.
NOISY = (
    "celery",
    "kombu",
    "amqp",
    "billiard",
    "asyncio",
    "aiohttp",
    "urllib3",
    "httpx",
    "httpcore",
    "opentelemetry",
    "faiss",
)
WHERE: ContextVar[Attempt | None] = ContextVar("agentmesh_attempt", default=None)
ENDS = {"StepDone": "done", "StepFailed": "failed", "StepRetried": "retried", "StepInDoubt": "in doubt"}
log = logging.getLogger("agentmesh.step")


class LogObserver:
    """An observer that marks what is logged inside a step, a tool's own lines too, and logs each step's end."""

    def step(self, step: Step[Any], at: Attempt, model: str) -> Any:
        """See Observer."""
        return self._attempt(step, at, model)

    @contextlib.contextmanager
    def _attempt(self, step: Step[Any], at: Attempt, model: str) -> Iterator[OnStepEnd]:
        token = WHERE.set(at)
        began_s = time.monotonic()

        def on_end(event: Event) -> None:
            took_s = time.monotonic() - began_s
            error = f": {event.error.get('message', '')}" if isinstance(event, StepFailed | StepRetried) else ""
            end = ENDS.get(type(event).__name__, type(event).__name__)
            by = f" by {model}" if model else ""
            log.info("%s %s %s in %.3f s%s%s", step.kind, step.name, end, took_s, by, error)

        try:
            yield on_end
        finally:
            WHERE.reset(token)

    def ended(self, history: History, end: Event) -> None:
        """See Observer."""
        started = history.started
        if started is not None:
            log.info("run %s of %s ended: %s", history.run_id, started.agent, type(end).__name__)


def _mark(record: logging.LogRecord) -> bool:
    """A filter that lets every record pass, and adds the attempt it was logged in."""
    record.at = WHERE.get()
    return True


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        at: Attempt | None = getattr(record, "at", None)
        line = super().formatMessage(record)
        if at is None:
            return line
        attempt = f" attempt {at.number}" if at.number > 1 else ""
        return f"{line} [{at.run_id} step {at.n}{attempt} {at.agent}]"


class _Json(logging.Formatter):
    def __init__(self, worker: str) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        at: Attempt | None = getattr(record, "at", None)
        line: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._worker:
            line["worker"] = self._worker
        if at is not None:
            line |= {"run": at.run_id, "step": at.n, "attempt": at.number, "agent": at.agent}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(form: Form | Literal[""] = "", *, worker: str = "") -> None:
    """Make the root logger of this process write to standard error in this form.

    Args:
        form: `text` and `json` log from INFO on; empty is text and warnings alone.
        worker: the process's name, in JSON.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Json(worker) if form == "json" else _Text())
    handler.addFilter(_mark)
    logging.basicConfig(level=logging.INFO if form else logging.WARNING, handlers=[handler])
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
