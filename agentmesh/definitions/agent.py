"""A role: instructions, model, tools, team, output type, flow. It has no state."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, cast, dataclass_transform, overload

from pydantic import BaseModel, ValidationError
from typing_extensions import TypeVar

from agentmesh.definitions.context import Context
from agentmesh.definitions.declaration import (
    Undeclared,
    check_type,
    fields_model,
    is_open,
    task_type,
    type_arguments,
    type_name,
)
from agentmesh.definitions.parameters import read_docstring
from agentmesh.definitions.step import Ask, Delegate, Step
from agentmesh.definitions.tool import Tool
from agentmesh.errors import ApprovalDenied, DefinitionError, NameTaken, OutputInvalid, StepError, ToolError
from agentmesh.message import Message, ToolCall, ToolSpec, system, tool_result, user
from agentmesh.model import Model
from agentmesh.schema import canonical, explain, from_json, json_schema, to_json

Out_co = TypeVar("Out_co", default=str, covariant=True)
In_contra = TypeVar(
    "In_contra", default=Annotated[str, Undeclared], contravariant=True
)  # text, where nothing is declared
AGENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
CODE_FENCE = re.compile(r"^\s*```[a-z]*\n(.*?)\n?```\s*$", re.DOTALL)


@dataclass_transform(kw_only_default=True)
class Agent(Generic[Out_co, In_contra]):
    """A role that a model plays, or plain code: subclass it.

    Class attributes say what it is. Annotated attributes are typed fields, with or without a default: they are given at
    construction and travel as JSON with a Delegate.

    `Agent` takes text and gives text, `Agent[Verdict]` takes text and gives a Verdict, `Agent[Verdict, Order]` takes an
    Order. Both types need a JSON form: what pydantic has a schema for.

    Args:
        model: `provider:name`, an object with `ask`, or None for the crew's.
        instructions: the system message; a property may compute it from fields.
        tools: functions the model may call.
        team: agents the model may delegate to.
        options: temperature, max_tokens, seed, stop: given to the model as they are.
        queue: of the crew, where its model calls wait; "" is the model's own queue or the crew's first.
        retries: how often a failed model call is retried, after the retries of the model's client.
        timeout_s: of one model call.
        name: the class's own when left out.
    """

    model: ClassVar[Model | str | None] = None
    instructions: ClassVar[Any] = ""  # a str; Any, so that both checkers let a property take its place
    tools: ClassVar[Sequence[Tool[..., Any]]] = ()
    team: ClassVar[Sequence["Agent[Any, Any]"]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    queue: ClassVar[str] = ""
    retries: ClassVar[int] = 3
    timeout_s: ClassVar[float | None] = None
    name: ClassVar[str] = "Agent"

    output: ClassVar[Any] = str
    task_type: ClassVar[Any] = str
    _types: ClassVar[tuple[Any, Any]] = (str, Undeclared)  # output and task, as the class and its bases give them
    _fields: ClassVar[type[BaseModel]]
    _values: BaseModel

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        if not AGENT_NAME.fullmatch(cls.name):
            raise DefinitionError(
                f"agent name {cls.name!r} is not allowed", hint="use letters, digits and `_`, at most 64 characters"
            )
        cls._types = type_arguments(cls, Agent, cls._types)
        if "output" not in cls.__dict__:
            cls.output = cls._types[0]
        cls._fields = fields_model(cls, Agent.__annotations__)
        cls.task_type = task_type(cls, None if cls.flow is Agent.flow else cls.flow, cls._types[1])
        check_type(cls, "output", cls.output)
        _check_tools_and_team(cls)

    def __init__(self, **fields: Any) -> None:
        if type(self) is Agent:
            raise DefinitionError("Agent itself cannot be made", hint="write a subclass: class Poet(Agent)")
        if open_types := [type_name(t) for t in (self.output, self.task_type) if is_open(t)]:
            raise DefinitionError(
                f"agent `{self.name}`: its type {open_types[0]} is not given",
                hint=f"write a subclass of {self.name}[…]",
            )
        try:
            self.__dict__["_values"] = self._fields(**fields)
        except ValidationError as e:
            raise DefinitionError(f"{self.name}({', '.join(fields)}): {explain(e)}") from None
        for name in self._fields.model_fields:
            self.__dict__[name] = getattr(self._values, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"agent `{self.name}` has no state: make another with {name}={value!r}, or keep it in a tool"
        )

    def _fields_json(self) -> dict[str, Any]:
        """The typed fields as JSON."""
        return self._values.model_dump(mode="json")

    @overload
    def on(self: "Agent[Out_co, str]", task: str = "") -> Step[Out_co]: ...
    @overload
    def on(self, task: In_contra) -> Step[Out_co]: ...
    def on(self, task: Any = "") -> Step[Out_co]:
        """The step that gives this agent a task, in a run of its own.

        Raises:
            DefinitionError: the task is not of the type that the agent takes.
        """
        return Delegate(self.name, self, self._task_json(task))

    def _task_json(self, task: Any) -> Any:
        """A task as JSON.

        Raises:
            DefinitionError: it is not of the type that the agent takes.
        """
        task_type = self.task_type
        if task_type is str and not isinstance(task, str):
            raise DefinitionError(
                f"agent `{self.name}` takes text, not {type(task).__name__}",
                hint=f"annotate `flow(self, task: {type(task).__name__}, ctx)` to take something else",
            )
        try:
            return to_json(task, task_type)
        except TypeError as e:
            raise DefinitionError(f"the task of agent `{self.name}`: {e}") from None

    # ---- the default flow ----------------------------------------------------------------------
    def flow(self, task: In_contra, ctx: Context) -> Out_co:
        """Ask the model, call the tools it asks for side by side, and ask again, until it answers without a call."""
        text = task if isinstance(task, str) else canonical(to_json(task, self.task_type))
        messages = ctx.messages = [*ctx.history, user(text)]
        corrected = False
        while True:
            reply = ctx.do(self.ask(messages))
            messages.append(reply)
            if reply.tool_calls:
                messages += self.call_tools(reply.tool_calls, ctx)
                continue
            try:
                return self._parse_output(reply.text)
            except OutputInvalid as e:
                if corrected:
                    raise
                corrected = True
                messages.append(user(f"{e}. Answer again, with the corrected JSON alone."))

    def ask(self, messages: Sequence[Message], *, plain: bool = False) -> Ask:
        """The step that asks this agent's model, with its instructions, tools and team.

        Args:
            plain: the answer is free text; else it has to meet the JSON Schema of the agent's output.
        """
        head = (system(self.instructions),) if self.instructions else ()
        schema = None if plain else self._output_schema()
        return Ask(
            self.name, self.model or "", (*head, *messages), self._tool_specs(), schema, dict(self.options),
            self.queue, self.retries, self.timeout_s,
        )  # fmt: skip

    def _tool_specs(self) -> list[ToolSpec]:
        """The tools and the team as the model sees them, made once."""
        cached: list[ToolSpec] | None = self.__dict__.get("_specs")
        if cached is None:
            cached = self.__dict__["_specs"] = [t.spec for t in self.tools] + [a._as_tool_spec() for a in self.team]
        return cached

    def _output_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the answer's text; None for plain text. A type that is not an object is wrapped as `value`."""
        if self.output is str:
            return None
        schema = json_schema(self.output)
        return schema if _is_object(schema) else _wrap_schema(schema)

    def _as_tool_spec(self) -> ToolSpec:
        """This agent as its team's leader sees it."""
        about = read_docstring(inspect.getdoc(type(self)) or "")[0] if type(self).__doc__ else ""
        task = {"type": "string", "description": "what to do, with all it needs to know"}
        if self.task_type is not str:
            task = json_schema(self.task_type)
        parameters = {
            "type": "object",
            "properties": {"task": task},
            "required": ["task"],
            "additionalProperties": False,
        }
        return ToolSpec(self.name, about or f"Delegate to {self.name}.", parameters)

    def call_tools(self, calls: Sequence[ToolCall], ctx: Context) -> list[Message]:
        """The results of the calls that a model asked for together: one message each, in order."""
        steps = [self._step_for(call) for call in calls]
        outcomes = iter(ctx.gather([s for s in steps if isinstance(s, Step)], errors=True))
        texts = [_outcome_text(next(outcomes)) if isinstance(s, Step) else s for s in steps]
        return [tool_result(call, text) for call, text in zip(calls, texts, strict=True)]

    def _step_for(self, call: ToolCall) -> Step[Any] | str:
        """The step that a model's call asks for, or the error text for the model."""
        try:
            for tool in self.tools:
                if tool.name == call.name:
                    return tool.call_from_json(call.arguments)
            for member in self.team:
                if member.name == call.name:
                    task = json.loads(call.arguments or "{}")["task"]
                    return member.on(from_json(task, member.task_type))
        except ValidationError as e:
            return f"error: {explain(e)}; call {call.name} again"
        except (ValueError, TypeError, KeyError, RecursionError, DefinitionError) as e:
            missing = "it needs `task`" if isinstance(e, KeyError) else str(e)
            return f"error: {missing}; call {call.name} again"
        names = ", ".join(s.name for s in self._tool_specs())
        return f"error: unknown tool {call.name!r}; use one of: {names or 'none'}"

    def _parse_output(self, text: str) -> Out_co:
        """The model's last text as the agent's output type.

        Raises:
            OutputInvalid: it does not have that type.
        """
        if self.output is str:
            return cast(Out_co, text)
        fenced = CODE_FENCE.match(text)
        try:
            data = json.loads(fenced.group(1) if fenced else text)
            if not _is_object(json_schema(self.output)):
                data = data["value"]
            return cast(Out_co, from_json(data, self.output))
        except ValidationError as e:
            raise OutputInvalid(
                f"the answer of `{self.name}` is not a {type_name(self.output)}: {explain(e)}"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            problem = "it needs `value`" if isinstance(e, KeyError) else e
            raise OutputInvalid(
                f"the answer of `{self.name}` is not JSON for {type_name(self.output)}: {problem}"
            ) from None


def _outcome_text(outcome: Any) -> str:
    """A step's value or error as a model reads it; an error that the model cannot correct is raised."""
    if isinstance(outcome, StepError):
        if isinstance(outcome, ApprovalDenied) or (isinstance(outcome, ToolError) and outcome.again):
            return str(outcome)
        raise outcome
    return outcome if isinstance(outcome, str) else canonical(to_json(outcome))


def _check_tools_and_team(cls: type["Agent[Any, Any]"]) -> None:
    seen: set[str] = set()
    for member in [*cls.tools, *cls.team]:
        if isinstance(member, type) and issubclass(member, Agent):
            raise DefinitionError(
                f"agent `{cls.__name__}`: team has the class {member.__name__}", hint=f"write `{member.__name__}()`"
            )
        if not isinstance(member, Tool | Agent):
            raise DefinitionError(f"agent `{cls.__name__}`: {member!r} is not a tool", hint=_tool_hint(member))
        if member.name in seen:
            raise NameTaken(
                f"agent `{cls.__name__}` has two tools or team members named {member.name!r}", hint="rename one"
            )
        seen.add(member.name)


def _tool_hint(value: Any) -> str:
    if type(value).__module__.startswith("langchain"):
        return "write `agentmesh.langchain.as_tool(it)`"
    return f"write `@tool` above `def {value.__name__}`" if inspect.isfunction(value) else "use `@tool` on a function"


def _is_object(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "object" or "$ref" in schema


def _wrap_schema(schema: dict[str, Any]) -> dict[str, Any]:
    defs = schema.pop("$defs", None)
    out = {"type": "object", "properties": {"value": schema}, "required": ["value"], "additionalProperties": False}
    return {**out, "$defs": defs} if defs else out
