"""A model that answers from a script: for tests and examples. A prompt without a reply is an error."""

import json
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from agentmesh.errors import ModelError
from agentmesh.message import Message, ToolCall, Usage
from agentmesh.model import Answer, Model, Prompt

WORD = re.compile(r"\s*\S+|\s+")  # every character is in one of them


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a scripted model; `uses(...) & uses(...)` is one with both tool calls."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()  # name, arguments as JSON text

    def __and__(self, other: "Reply") -> "Reply":
        return Reply(self.text + other.text, self.calls + other.calls)


def says(text: Any) -> Reply:
    """An answer of text; anything but a str is written as JSON."""
    return Reply(text if isinstance(text, str) else json.dumps(text, default=lambda o: o.model_dump(mode="json")))


def uses(tool_name: str, /, **arguments: Any) -> Reply:
    """An answer that calls a tool."""
    return Reply("", ((tool_name, json.dumps(arguments)),))


Script = Iterable[Reply | str | Exception] | Callable[[Prompt], Reply | str | Exception]


class ScriptedModel(Model):
    """A Model that answers from a list in order, or from a function of the Prompt.

    Args:
        name: what it is called in metrics, spans and logs.

    Attributes:
        prompts: every Prompt so far.
    """

    def __init__(self, script: Script = (), *, name: str = "") -> None:
        super().__init__(name)
        self._script = script if callable(script) else iter(list(script))
        self._lock = threading.Lock()
        self.prompts: list[Prompt] = []

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See Model."""
        with self._lock:
            self.prompts.append(prompt)
            count = len(self.prompts)
            reply = self._script(prompt) if callable(self._script) else next(self._script, None)
        if reply is None:
            last = prompt.messages[-1].text if prompt.messages else ""
            raise ModelError(f"prompt {count} is not in the script: {last[:200]!r}", hint="add a reply for it")
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, str):
            reply = says(reply)
        if on_token is not None:
            for token in WORD.findall(reply.text):
                on_token(token)
        calls = tuple(ToolCall(f"call_{count}_{i}", name, arguments) for i, (name, arguments) in enumerate(reply.calls))
        input_tokens = sum(len(m.text.split()) for m in prompt.messages)
        usage = Usage(max(1, input_tokens), max(1, len(reply.text.split())))
        return Answer(Message("assistant", reply.text, calls), usage, "tool_calls" if calls else "stop")

    async def close(self) -> None:
        """See Model."""
