"""A model as the engine sees it: messages in, message out. `models/` and other packages' plugins implement it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
        after_s: seconds until the next attempt.
        away: no server was reachable. The attempt is not counted against `retries`; it waits as long as its queue says.
    """

    def __init__(self, error: Exception, after_s: float, *, away: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.after_s, self.away = error, after_s, away


class Model(ABC):
    """Messages in, message out. One object serves many concurrent calls of `ask`, on one event loop or several.

    A provider is a subclass with `ask`, declared in the entry-point group `agentmesh.models`; `echo:any` then makes
    `Echo("any")`, once a process (docs/guides/plugins.md). An agent also takes an object: `model = Echo("any")`.

    Args:
        name: the text after the colon; of an object, what it is called in metrics, spans and logs.
    """

    name: str = ""

    def __init__(self, name: str = "") -> None:
        self.name = name

    @abstractmethod
    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """The answer; `on_token` gets each piece of text as it comes, all of them on the event loop that asks.

        Cancelled, it leaves no request and no task behind.

        Raises:
            ModelError: and its subclasses, where a retry would not help.
            RetryLater: where it would, but not within 5 s. Anything else that is raised is retried after a back-off.
        """

    async def close(self) -> None:  # noqa: B027  # most keep nothing open
        """Close what is open on the running loop; another `ask` opens it again. No request is in flight then."""


def model_name(model: Any) -> str:
    """What a model is called in metrics, spans and logs: `provider:name` as it is; an object's `name`, or its class's."""
    if not hasattr(model, "ask"):
        return str(model or "")
    return str(getattr(model, "name", "") or type(model).__name__)
