"""A bare model request as a run: what `agentmesh serve` starts for a request that names no agent."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.context import Context
from agentmesh.definitions.step import Ask
from agentmesh.message import Message, ToolSpec


class ModelRequest(BaseModel):
    """What a client asks a model: the whole request.

    Args:
        model: `provider:name`.
        output: JSON Schema of the answer's text, or None.
        options: temperature, max_tokens, stop: given to the model as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    output: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = {}


class Passthrough(Agent[str, ModelRequest]):
    """Passes a request to a model as it is. Every crew has it beside its own agents; the client calls the tools itself."""

    name = "_asked"

    def flow(self, task: ModelRequest, ctx: Context) -> str:
        """One Ask. The run's value is the answer's text; the whole message is the step's value in the journal."""
        reply = ctx.do(Ask(self.name, task.model, task.messages, task.tools, task.output, task.options))
        ctx.messages = [*task.messages, reply]
        return reply.text
