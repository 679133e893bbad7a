"""What a client is told instead of an answer, in OpenAI's shape of errors; from our errors, or a sentence of its own."""

from typing import Any

from agentmesh.errors import (
    ConfigError,
    DefinitionError,
    LimitReached,
    MeshError,
    RunCancelled,
    RunFailed,
    ServiceDown,
)

# What a run failed with -> HTTP status and OpenAI's code for it. Asking again would cost the same and fail the same.
CAUSES = {
    "ContextTooLong": (400, "context_length_exceeded"),
    "GpuOutOfMemory": (400, "context_length_exceeded"),
    "ModelRefused": (502, "model_refused"),
    "ModelError": (502, "model_error"),
    "OutputInvalid": (502, "output_invalid"),
    "StepTimeout": (504, "step_timeout"),
    "LimitReached": (429, "limit_reached"),
}


class Refusal(Exception):
    """An error as a client gets it.

    Args:
        status: the HTTP status.
        code: for programs; the text is for people.
        param: which part of the request is wrong.
        again: whether the same request may succeed later; None leaves that to the status.
    """

    def __init__(
        self, status: int, message: str, code: str = "", *, param: str = "", again: bool | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.again = status, message, code, param, again

    def to_json(self) -> dict[str, Any]:
        """The body.

        Source: https://platform.openai.com/docs/guides/error-codes
        """
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        said = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": said}

    @property
    def headers(self) -> dict[str, str]:
        """The official client obeys this word."""
        return {} if self.again is None else {"x-should-retry": "true" if self.again else "false"}


def refusal_of(error: MeshError) -> Refusal:
    """What to say of one of our errors."""
    if isinstance(error, RunCancelled):
        return Refusal(409, error.message, "run_cancelled", again=False)
    if isinstance(error, RunFailed | LimitReached):
        cause = error.cause or "" if isinstance(error, RunFailed) else "LimitReached"
        status, code = CAUSES.get(cause, (500, "run_failed"))
        return Refusal(status, error.message, code, again=False)
    if isinstance(error, ServiceDown):
        return Refusal(503, error.message, "service_down", again=True)
    if isinstance(error, DefinitionError):
        return Refusal(400, error.message, "invalid_value")
    if isinstance(error, ConfigError):
        return Refusal(500, error.message, "config", again=False)
    return Refusal(500, error.message, again=False)
