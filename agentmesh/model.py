"""A model as the engine sees it: messages in, message out. Clients in `models/` implement it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from agentmesh.message import Message, ToolSpec, Usage


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to a model.

    Args:
        model: the name after the provider: `gpt-5-mini`, `smollm2`.
        output: a JSON Schema the answer's text must meet, or None for free text.
        options: temperature, max_tokens, seed, stop: only what the agent sets.
    """

    model: str
    messages: Sequence[Message]
    tools: Sequence[ToolSpec] = ()
    output: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer; `finish` says why it ended."""

    message: Message
    usage: Usage = NO_USAGE
    finish: Literal["stop", "length", "tool_calls"] = "stop"


class Thought(str):
    """A piece of a model's reasoning, passed to `on_token`; not part of the answer, and never sent back to the model."""

    __slots__ = ()


class RetryLater(Exception):
    """An attempt failed, and the next one should wait longer than a worker should be occupied: the step is retried.

    Args:
        after_s: the delay before the next attempt.
        away: no server could be reached. This is not counted against the step's `retries`; the queue says how long it waits.
    """

    def __init__(self, error: Exception, after_s: float, *, away: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.after_s, self.away = error, after_s, away


class Model(Protocol):
    """Messages in, message out. One object serves many concurrent calls of `ask` on one event loop."""

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """The answer; `on_token` gets each piece of text as it comes.

        Raises:
            ModelError: (or a subclass) a retry would not help.
            RetryLater: a retry may help, after more than 5 s.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...
