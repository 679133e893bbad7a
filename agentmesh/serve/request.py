"""A chat request as clients write it: parsed, checked, and resolved to an agent and its task. Pure.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.passthrough import ModelRequest, Passthrough
from agentmesh.definitions.step import Ask
from agentmesh.errors import did_you_mean
from agentmesh.message import Message, ToolCall, ToolSpec
from agentmesh.schema import explain, loads
from agentmesh.schema import from_json as from_json_value
from agentmesh.serve.responses import ApiError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Clients send these without being asked, and they change nothing here.
IGNORED_FIELDS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip
READ_FIELDS = frozenset({
    "model", "messages", "tools", "response_format", "stream", "stream_options", "n", "logprobs", "top_logprobs",
})  # fmt: skip
TOOL_CHOICES = ("none", "auto", "required")
STREAM_OPTIONS = ("include_usage", "include_obfuscation")  # the second pads chunks against who reads their lengths
# What this project's own engine takes; of all other options only values that change nothing.
ENGINE_OPTIONS = frozenset({"temperature", "top_p", "top_k", "seed", "stop", "max_tokens", "tool_choice"})
NEUTRAL_VALUES: Mapping[str, Any] = {
    "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0, "logit_bias": {},
    "parallel_tool_calls": True, "response_format": None,
}  # fmt: skip
Stop = Annotated[str, Field(min_length=1)]


class ChatOptions(BaseModel):
    """Options that are passed to the model unchanged."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: Stop | list[Stop] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, float] | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat request, parsed."""

    model: str
    messages: Sequence[Message]
    tools: Sequence[ToolSpec] = ()
    output: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    usage_in_stream: bool = False


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: it is not one.
    """
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as e:
        raise ApiError(400, f"the body is not JSON: {e}", "invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is a JSON {type(data).__name__}; it must be an object", "invalid_json")
    return {k: v for k, v in data.items() if v is not None}


def parse_chat(raw: bytes) -> ChatRequest:
    """The request.

    Raises:
        ApiError: the request is wrong; the message says where.
    """
    data = parse_object(raw)
    known_fields = {*READ_FIELDS, *IGNORED_FIELDS, *ChatOptions.model_fields}
    for name in data:
        if name not in known_fields:
            _invalid(
                name, f"there is no parameter {name!r} here.{did_you_mean(name, known_fields)}", "unknown_parameter"
            )
    if data.get("n", 1) != 1:
        _invalid("n", f"n is {data['n']!r}; each request gets one answer here: leave it out")
    for name in ("logprobs", "top_logprobs"):
        if data.get(name):
            _invalid(name, "logprobs are not given here; leave it out")
    model = data.get("model")
    if not isinstance(model, str) or not model:
        _invalid("model", "the request names no model; GET /v1/models lists them")
    tools = _tools(data.get("tools", []))
    options = _options(data, tools)
    output = _output(data.get("response_format", {}), options)
    of_stream = _object(data, "stream_options")
    for name in of_stream:
        if name not in STREAM_OPTIONS:
            _invalid("stream_options", f"there is no {name!r} in `stream_options`.{did_you_mean(name, STREAM_OPTIONS)}")
    return ChatRequest(
        model, _messages(data.get("messages")), tools, output, options, _flag(data, "stream"),
        _flag(of_stream, "include_usage"),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatTarget:
    """Which agent answers a chat: its task, and the messages before it."""

    agent: Agent[Any, Any]
    task: Any
    history: Sequence[Message] = ()


def chat_target(chat: ChatRequest, crew: Crew, models: Sequence[str]) -> ChatTarget:
    """The agent that a chat names, or Passthrough with the model that it names.

    Raises:
        ApiError: there is neither, or the chat asks what that one cannot do.
    """
    if chat.model in crew.agents:
        return _of_agent(crew.agents[chat.model], chat)
    if chat.model not in models:
        raise unknown_model(chat.model, [*crew.agents, *models])
    if chat.model.startswith("local:") and crew.queues.servers_of(Ask(Passthrough.name, chat.model)) is None:
        chat = check_for_local_engine(chat)
    request = ModelRequest(
        model=chat.model,
        messages=tuple(chat.messages),
        tools=tuple(chat.tools),
        output=chat.output,
        options=chat.options,
    )
    return ChatTarget(Passthrough(), request)


def unknown_model(name: str, names: Sequence[str]) -> ApiError:
    """What to answer where there is no model of this name."""
    message = f"there is no model {name!r} here; use one of {', '.join(names)}.{did_you_mean(name, names)}"
    return ApiError(404, message, "model_not_found", param="model")


def _of_agent(agent: Agent[Any, Any], chat: ChatRequest) -> ChatTarget:
    for name, value in (("tools", chat.tools), ("response_format", chat.options.get("response_format"))):
        if value:
            own = "tools" if name == "tools" else "output type"
            _invalid(name, f"agent {chat.model!r} has its own {own}; leave out `{name}`")
    *history, last = chat.messages
    if last.role != "user":
        _invalid("messages", f"the last message to an agent is its task: it must be of role 'user', not {last.role!r}")
    if agent.task_type is str:
        return ChatTarget(agent, last.text, history)
    try:
        return ChatTarget(agent, from_json_value(loads(last.text), agent.task_type), history)
    except (ValueError, ValidationError) as e:
        why = explain(e) if isinstance(e, ValidationError) else str(e)
        _invalid("messages", f"agent {chat.model!r} takes JSON as the last message's text: {why}")


def check_for_local_engine(chat: ChatRequest) -> ChatRequest:
    """The request as this project's own engine takes it.

    Raises:
        ApiError: it asks for something that the engine cannot do.
    """
    options, output = dict(chat.options), chat.output
    if most := options.pop("max_completion_tokens", None):
        options["max_tokens"] = most
    response_format = options.pop("response_format", {})
    if response_format.get("type") == "json_object":
        output = {"type": "object"}
    for name in [name for name in options if name not in ENGINE_OPTIONS]:
        if name not in NEUTRAL_VALUES or options.pop(name) != NEUTRAL_VALUES[name]:
            _invalid(name, f"model {chat.model!r} takes no `{name}`: this project's engine computes it; leave it out")
    return replace(chat, options=options, output=output)


def _options(data: dict[str, Any], tools: Sequence[ToolSpec]) -> dict[str, Any]:
    try:
        parsed = ChatOptions(**{k: v for k, v in data.items() if k in ChatOptions.model_fields})
    except ValidationError as e:
        raise ApiError(400, explain(e), "invalid_value", param=str(e.errors()[0]["loc"][0])) from None
    choice = parsed.tool_choice
    if isinstance(choice, str) and choice not in TOOL_CHOICES:
        _invalid("tool_choice", f"tool_choice is {choice!r}; it must be 'none', 'auto', 'required', or name a function")
    if isinstance(choice, dict) and choice.get("type", "function") != "function":
        _invalid("tool_choice", f"tool_choice has type {choice['type']!r}; only that of one 'function' is taken here")
    if isinstance(choice, dict):
        function_name = choice["function"].get("name") if isinstance(choice.get("function"), dict) else None
        if function_name not in [t.name for t in tools]:
            _invalid("tool_choice", f"tool_choice names the function {function_name!r}, which is not among `tools`")
    if choice == "required" and not tools:
        _invalid("tool_choice", "tool_choice is 'required' and there are no `tools`; send some, or leave it out")
    return parsed.model_dump(exclude_none=True)


def _output(response_format: Any, options: dict[str, Any]) -> Mapping[str, Any] | None:
    kind = response_format.get("type", "text") if isinstance(response_format, dict) else None
    if kind == "json_schema":
        schema = (
            response_format["json_schema"].get("schema")
            if isinstance(response_format.get("json_schema"), dict)
            else None
        )
        if not isinstance(schema, dict):
            _invalid("response_format", "response_format is a json_schema without `json_schema.schema`, a JSON Schema")
        # as it was written, for servers that read its name and strictness
        options["response_format"] = {
            **response_format,
            "json_schema": {"name": "answer", **response_format["json_schema"]},
        }
        return schema
    if kind == "json_object":
        options["response_format"] = {"type": "json_object"}
    elif kind != "text":
        _invalid(
            "response_format",
            f"response_format {response_format!r} must have type 'text', 'json_object' or 'json_schema'",
        )
    return None


def _tools(tools: Any) -> list[ToolSpec]:
    if not isinstance(tools, list):
        _invalid("tools", "`tools` must be a list")
    specs = []
    for i, one in enumerate(tools):
        function = one.get("function") if isinstance(one, dict) and one.get("type", "function") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _invalid(f"tools[{i}]", f"tools[{i}] must be a function with a name: other kinds of tools are not here")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict):
            _invalid(f"tools[{i}]", f"tools[{i}]: `parameters` must be a JSON Schema object")
        strict = function.get("strict")
        if not isinstance(strict, bool | None):
            _invalid(f"tools[{i}]", f"tools[{i}]: `strict` is {strict!r}; it must be true or false")
        specs.append(ToolSpec(function["name"], str(function.get("description") or ""), parameters, strict))
    return specs


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        _invalid("messages", "`messages` must be a list with at least one message")
    return [_message(f"messages[{i}]", one) for i, one in enumerate(messages)]


def _message(where: str, one: Any) -> Message:
    role = one.get("role") if isinstance(one, dict) else None
    if role not in ROLES:
        _invalid(where, f"{where} has role {role!r}; it must be one of {', '.join(ROLES)}")
    text = _text(where, one.get("content"))
    if role == "tool":
        call = one.get("tool_call_id")
        if not isinstance(call, str) or not call:
            _invalid(where, f"{where} is of role 'tool' and has no `tool_call_id`: say which call it answers")
        return Message("tool", text, tool_call_id=call)
    if role == "assistant":
        raw_calls = one.get("tool_calls") or []
        if not isinstance(raw_calls, list):
            _invalid(where, f"{where} has `tool_calls` of type {type(raw_calls).__name__!r}; it must be a list")
        calls = tuple(_call(where, c) for c in raw_calls)
        return Message("assistant", text or str(one.get("refusal") or ""), calls)
    if one.get("content") is None:
        _invalid(where, f"{where} has no `content`")
    return Message("user" if role == "user" else "system", text)


def _text(where: str, content: Any) -> str:
    """Text, or its parts put together; images and sounds are not taken."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            _invalid(where, f"{where} has content of type {kind!r}; only text is taken here")
        texts.append(part["text"])
    return "".join(texts)


def _call(where: str, call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        _invalid(where, f"{where} has a tool call without a `function`")
    parts = [call.get("id"), function.get("name"), function.get("arguments", "")]
    texts = [text for text in parts if isinstance(text, str)]
    if len(texts) < len(parts):
        _invalid(where, f"{where} has a tool call whose `id`, `function.name` or `function.arguments` is not text")
    return ToolCall(*texts)


def _object(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, dict):
        _invalid(name, f"`{name}` must be an object")
    return dict(value)


def _flag(data: dict[str, Any], name: str) -> bool:
    value = data.get(name) or False
    if not isinstance(value, bool):
        _invalid(name, f"{name} is {value!r}; it must be true or false")
    return bool(value)


def _invalid(param: str, message: str, code: str = "invalid_value") -> NoReturn:
    raise ApiError(400, message, code, param=param)
