"""A model as the engine sees it: messages in, message out. Adapters in `models/` implement it; the engine knows nothing else of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from agentmesh.message import Message, ToolSpec, Usage


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to a model.

    Args:
        model: the name after the provider: `gpt-5-mini`, `smollm2`.
        output: a JSON Schema the answer's text must meet, or None for free text.
        options: temperature, max_tokens, seed, stop: what the agent set, nothing else.
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
    """A piece of a model's reasoning, told by `on_token`; not part of the answer and never sent back."""

    __slots__ = ()


class RetryLater(Exception):
    """An attempt failed and the next one should wait longer than a worker ought to: the step is retried.

    Args:
        away: nobody was there to be asked, which is none of the step's `retries`; it waits as long as its queue says.
    """

    def __init__(self, error: Exception, after_s: float, *, away: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.after_s, self.away = error, after_s, away


class Model(Protocol):
    """Messages in, message out (or tokens). One object serves many concurrent asks of one event loop."""

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """The answer; `on_token` gets each piece of text as it comes.

        Raises:
            ModelError: and its kin, when asking again would not help.
            RetryLater: when it would, but not within 5 s.
        """
        ...

    async def close(self) -> None:
        """Give back connections."""
        ...
