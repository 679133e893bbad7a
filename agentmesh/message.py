"""What goes to a model and what comes back: messages, tool calls, usage. Plain values, JSON both ways."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model's request to call a tool.

    Args:
        arguments: the JSON text as the model wrote it; it may be invalid.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""  # of a `tool` message: which call it answers

    def to_json(self) -> dict[str, Any]:
        """Only what is set."""
        out: dict[str, Any] = {"role": self.role, "text": self.text}
        if self.tool_calls:
            out["tool_calls"] = [[c.id, c.name, c.arguments] for c in self.tool_calls]
        if self.tool_call_id:
            out["tool_call_id"] = self.tool_call_id
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Message":
        """The message that `to_json` wrote."""
        calls = tuple(ToolCall(*c) for c in data.get("tool_calls", ()))
        return cls(data["role"], data.get("text", ""), calls, data.get("tool_call_id", ""))


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as a model sees it.

    Args:
        parameters: a JSON Schema object.
        strict: whether a server is asked to enforce the schema; None leaves that to the server.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool | None = None


def system(text: str) -> Message:
    """Instructions."""
    return Message("system", text)


def user(text: str) -> Message:
    """What a person, or the calling agent, says."""
    return Message("user", text)


def assistant(text: str) -> Message:
    """What a model says."""
    return Message("assistant", text)


def tool_result(call: ToolCall, text: str) -> Message:
    """A tool's answer to one call."""
    return Message("tool", text, tool_call_id=call.id)


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer cost; unknown numbers are 0.

    Args:
        cached_tokens: input tokens that were not computed again.
        batch: the largest number of requests that were computed together with it.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost_usd: float = 0.0
    batch: int = 0

    @property
    def tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.cost_usd + other.cost_usd,
            max(self.batch, other.batch),
        )

    def to_json(self) -> dict[str, float]:
        """Only what is not zero, in short names: in out cached usd batch."""
        values = {
            "in": self.input_tokens,
            "out": self.output_tokens,
            "cached": self.cached_tokens,
            "usd": self.cost_usd,
            "batch": self.batch,
        }
        return {k: v for k, v in values.items() if v}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Usage":
        """The usage that `to_json` wrote."""
        return cls(
            data.get("in", 0), data.get("out", 0), data.get("cached", 0), data.get("usd", 0.0), data.get("batch", 0)
        )
