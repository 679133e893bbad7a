"""LangChain's chat models and tools as ours. None of its types reaches a journal."""

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from typing_extensions import Unpack

from agentmesh.definitions.tool import Tool, ToolOptions
from agentmesh.errors import DefinitionError, ExtraMissing
from agentmesh.message import Message, ToolCall, ToolSpec, Usage
from agentmesh.model import Answer, Model, Prompt

try:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_core.tools import BaseTool
except ImportError as e:
    raise ExtraMissing(
        f"LangChain needs {e.name}, which is not installed", hint="pip install 'agentmesh-celery[langchain]'"
    ) from None


class _ChatModel(Model):
    """A LangChain chat model as a Model."""

    def __init__(self, chat: BaseChatModel) -> None:
        super().__init__(str(getattr(chat, "model_name", "") or getattr(chat, "model", "") or type(chat).__name__))
        self._chat = chat

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See Model."""
        chat: Any = self._chat
        if prompt.output is not None:
            chat = chat.bind(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": dict(prompt.output)},
                }
            )
        if prompt.tools:
            chat = chat.bind_tools([_function(t) for t in prompt.tools])
        messages = to_langchain(prompt.messages)
        if on_token is None:
            return answer_of(await chat.ainvoke(messages, **prompt.options))
        whole: Any = None
        async for chunk in chat.astream(messages, **prompt.options):
            whole = chunk if whole is None else whole + chunk
            if text := _text(chunk):
                on_token(text)
        return answer_of(whole)

    async def close(self) -> None:
        """See Model."""


def as_model(chat: BaseChatModel) -> _ChatModel:
    """A LangChain chat model for `Agent.model` or `Crew(model=…)`."""
    if not isinstance(chat, BaseChatModel):
        raise DefinitionError(f"as_model was given {type(chat).__name__}", hint="give it a LangChain chat model")
    return _ChatModel(chat)


def as_tool(tool: BaseTool, **options: Unpack[ToolOptions]) -> Tool[..., Any]:
    """A LangChain tool for `Agent.tools`, with its own name, description and arguments.

    Args:
        options: as `@tool` takes them, without a name: see ToolOptions.
    """
    if not isinstance(tool, BaseTool):
        raise DefinitionError(f"as_tool was given {type(tool).__name__}", hint="give it a LangChain tool")

    async def call(**arguments: Any) -> Any:
        return await tool.ainvoke(arguments)

    name: str = tool.name
    description: str = tool.description
    schema_or_model: Any = tool.args_schema
    if not isinstance(schema_or_model, dict):
        schema_or_model = tool.tool_call_schema  # without the arguments that LangChain injects
    fields: dict[str, Any] | None = getattr(schema_or_model, "model_fields", None)
    if fields is None:  # a JSON Schema, as langchain-mcp-adapters gives it, or a model of pydantic's first version
        schema: dict[str, Any] = schema_or_model if isinstance(schema_or_model, dict) else schema_or_model.schema()
        schema_tool: Tool[..., Any] = Tool.from_schema(name, schema, call, description=description, **options)
        return schema_tool
    parameters = [
        inspect.Parameter(
            field_name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[field.annotation, field],
            default=inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True),
        )
        for field_name, field in fields.items()
    ]  # fmt: skip
    call.__name__ = name
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(call)["__signature__"] = inspect.Signature(parameters)
    return Tool(call, name=name, description=description, **options)


def to_langchain(messages: Sequence[Message]) -> list[BaseMessage]:
    """Our messages as LangChain's."""
    out: list[BaseMessage] = []
    for m in messages:
        if m.role == "assistant":
            calls: list[Any] = [
                {"id": c.id, "name": c.name, "args": _arguments(c.arguments), "type": "tool_call"} for c in m.tool_calls
            ]
            out.append(AIMessage(content=m.text, tool_calls=calls))
        elif m.role == "tool":
            out.append(ToolMessage(content=m.text, tool_call_id=m.tool_call_id))
        else:
            out.append(SystemMessage(content=m.text) if m.role == "system" else HumanMessage(content=m.text))
    return out


def from_langchain(message: BaseMessage) -> Message:
    """A LangChain message as ours."""
    roles: dict[str, Any] = {
        "ai": "assistant",
        "AIMessageChunk": "assistant",
        "human": "user",
        "system": "system",
        "tool": "tool",
    }
    calls = tuple(
        ToolCall(c.get("id") or f"call_{i}", c["name"], json.dumps(c["args"]))
        for i, c in enumerate(getattr(message, "tool_calls", None) or ())
    )
    role = roles.get(message.type, "user")
    return Message(role, _text(message), calls, getattr(message, "tool_call_id", "") or "")


def answer_of(message: Any) -> Answer:
    """A LangChain answer as ours, with its usage."""
    answer = from_langchain(message)
    counts = getattr(message, "usage_metadata", None) or {}
    usage = Usage(counts.get("input_tokens", 0), counts.get("output_tokens", 0))
    return Answer(answer, usage, "tool_calls" if answer.tool_calls else "stop")


def _text(message: Any) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def _arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _function(spec: ToolSpec) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)},
    }
