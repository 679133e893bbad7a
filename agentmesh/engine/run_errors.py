"""How a run ended without a value, and why a decision was refused: as exceptions."""

from agentmesh.errors import RunCancelledError, RunError, RunFailedError, StepError, error_from_json, message_of
from agentmesh.journal.events import Event, RunCancelled, RunFailed
from agentmesh.journal.types import Refused


def run_error(run_id: str, end: Event) -> RunError:
    """How a run ended without a value, as an exception: a RunError as itself, any other error as its cause."""
    if isinstance(end, RunCancelled):
        return RunCancelledError(f"run {run_id} was cancelled{f' by {end.by}' if end.by else ''}", run_id=run_id)
    assert isinstance(end, RunFailed)
    cause = error_from_json(end.error)
    if isinstance(cause, RunError):
        return cause
    where = f" in step {cause.n}" if isinstance(cause, StepError) and cause.n else ""
    kind = end.error["type"]
    message = message_of(end.error)
    return RunFailedError(
        f"run {run_id} failed{where}: {message if kind in message else f'{kind}: {message}'}", run_id=run_id, cause=kind
    )


def unknown_run(run_id: str) -> RunError:
    """There is no such run."""
    return RunError(f"there is no run {run_id!r}", hint="list them with: agentmesh runs ls", run_id=run_id)


def refusal_error(run_id: str, event: Event, answer: Refused) -> RunError:
    """Why a decision was not recorded, and what to do."""
    if answer.why == "unknown":
        return unknown_run(run_id)
    message, hint = _refusal(run_id, getattr(event, "n", None), answer)
    return RunError(message, hint=hint, run_id=run_id)


def _refusal(run_id: str, n: int | None, answer: Refused) -> tuple[str, str]:
    root, detail = run_id.partition("/")[0], f" ({answer.detail})" if answer.detail else ""
    if answer.why == "ended":
        hint = "" if answer.detail == "done" else f"retry its failed steps with: agentmesh runs retry {root}"
        return f"run {run_id} has ended{detail}", hint
    if answer.why == "run":
        hint = f"run `agentmesh runs resolve {run_id} 0 retry` or `agentmesh runs cancel {run_id}`"
        return f"run {run_id} is blocked as a whole{detail}, and only `retry` resolves it", hint
    if answer.why == "not_waiting":
        return f"step {n} of run {run_id} is not waiting for this{detail}", ""
    return answer.why, ""
