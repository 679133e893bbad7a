"""A typed function a model may call."""

import inspect
import json
import re
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache, partial
from sys import getsizeof
from types import NoneType
from typing import Any, Generic, Literal, Never, ParamSpec, Protocol, TypedDict, TypeVar, get_type_hints, overload

from pydantic import ValidationError
from typing_extensions import Unpack

from agentmesh.definitions.parameters import FunctionParameters, Parameters, function_name, read_docstring
from agentmesh.definitions.step import Call, StepPolicy, ToolContext
from agentmesh.errors import DefinitionError, ToolSignatureError
from agentmesh.message import ToolSpec
from agentmesh.schema import explain
from agentmesh.sized_cache import MIB, SizedCache

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Delivery = Literal["idempotent", "at_most_once"]
TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
TOO_DEEP = "the arguments are nested too deeply"
MAX_CACHED_CHARS = 200  # characters of an argument; calls with longer ones are not kept, which bounds the cache's bytes


class ToolOptions(TypedDict, total=False):
    """What `@tool(…)`, `Tool.from_schema` and `agentmesh.langchain.as_tool` take besides a name.

    Args:
        timeout_s: of one attempt.
        retries: how often an exception is tried again; not for at_most_once.
        delivery: `idempotent` may be repeated after a crash, with the same `ToolContext.key`; `at_most_once` may not.
        approve: each call waits for a person.
        queue: of the crew, where its calls wait; "" is the crew's first.
        reconcile: called after a crash with the key: the tool's value, `NotDone`, or `Unknown` (a person decides).
        max_output_bytes: longer text keeps its head and tail; longer JSON is an error.
    """

    timeout_s: float | None
    retries: int
    delivery: Delivery
    approve: bool
    queue: str
    reconcile: Callable[[str], Any] | None
    max_output_bytes: int


class Tool(Generic[P, R_co]):
    """A function with what a model and the engine must know of it. Made by `@tool` or `Tool.from_schema`.

    Called, it is the function. `.on(...)` is the step that calls it; its value has the type `R_co`.
    """

    def __init__(
        self, func: Callable[P, Any], *, name: str = "", description: str | None = None, parameters: Parameters | None = None,
        timeout_s: float | None = None, retries: int = 0, delivery: Delivery = "idempotent", approve: bool = False,
        queue: str = "", reconcile: Callable[[str], Any] | None = None, max_output_bytes: int = 1 << 20,
    ) -> None:  # fmt: skip
        self.func, self.name = func, name or function_name(func)
        self.timeout_s, self.retries, self.delivery = timeout_s, retries, delivery
        self.approve, self.queue, self.reconcile = approve, queue, reconcile
        self.max_output_bytes = max_output_bytes
        self.policy = StepPolicy(  # once a tool: each of its steps is asked for it at every replay
            queue,
            timeout_s,
            retries,
            delivery == "at_most_once",
            reconcile,
            max_output_bytes,
            "approve" if approve else "",
        )
        self.__doc__, self.__name__ = func.__doc__, self.name
        self.__module__ = func.__module__
        self._check()
        self.context = tuple(_context_parameters(func, self.name))
        self._positional: list[str] = []
        if parameters is None:
            parameters = self._read_parameters()
        self.parameters = parameters
        self.returns: Any = parameters.returns
        if description is None:
            description, _ = read_docstring(inspect.getdoc(func) or "")
        self.spec = ToolSpec(self.name, description, parameters.schema)

    def _read_parameters(self) -> Parameters:
        try:
            parameters = FunctionParameters(self.func, hidden=frozenset(self.context))
        except ToolSignatureError as e:
            raise ToolSignatureError(f"tool `{self.name}`: {e.message}", hint=e.hint) from None
        except (TypeError, NameError) as e:
            raise ToolSignatureError(f"tool `{self.name}`: {e}") from None
        every = inspect.signature(self.func).parameters.values()
        self._positional = [p.name for p in every if p.kind is p.POSITIONAL_ONLY]
        return parameters

    def _check(self) -> None:
        if not TOOL_NAME.fullmatch(self.name):
            raise DefinitionError(
                f"tool name {self.name!r} is not allowed",
                hint="use letters, digits, `_` and `-`, at most 64 characters",
            )
        if self.delivery not in ("idempotent", "at_most_once"):
            raise DefinitionError(
                f"tool `{self.name}`: unknown delivery {self.delivery!r}", hint="use 'idempotent' or 'at_most_once'"
            )
        if self.delivery == "at_most_once" and self.retries:
            raise DefinitionError(
                f"tool `{self.name}` is at_most_once and has retries={self.retries}: a retry is a second delivery",
                hint="drop one of the two",
            )
        if inspect.isasyncgenfunction(self.func):
            raise ToolSignatureError(f"tool `{self.name}` is an asynchronous generator", hint="return a list")
        if self.retries < 0:
            raise DefinitionError(f"tool `{self.name}`: retries={self.retries} is negative", hint="use 0 or more")

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R_co:
        value: R_co = self.func(*args, **kwargs)
        return value

    def on(self, /, *args: P.args, **kwargs: P.kwargs) -> Call[R_co]:
        """The step that calls this tool, for `ctx.do` and `ctx.gather`.

        Raises:
            ToolSignatureError: the arguments do not fit, or are not JSON.
        """
        small = all(_is_small(a) for a in args) and all(_is_small(a) for a in kwargs.values())
        if small:
            return _cached_call(self, *args, **kwargs)  # type: ignore[arg-type]  # what is small is hashable
        return _make_call(self, args, kwargs)

    def call_from_json(self, arguments: str) -> Call[R_co]:
        """The step that calls this tool with the JSON a model wrote.

        Raises:
            ValueError: it is not JSON, or (pydantic.ValidationError) it does not fit.
        """
        return _cached_call_from_json(self, arguments)

    def bind(self, arguments: Mapping[str, Any], context: ToolContext) -> Callable[[], Any]:
        """The function, ready to be called with typed arguments."""
        typed = self.parameters.parse(arguments) | dict.fromkeys(self.context, context)
        positional = [typed.pop(name) for name in self._positional]
        return partial(self.func, *positional, **typed)

    @overload
    @staticmethod
    def from_schema(  # type: ignore[overload-overlap]
        name: str, json_schema: Mapping[str, Any], call: Callable[..., Never], *, description: str = "",
        **options: Unpack[ToolOptions],
    ) -> "Tool[..., Any]": ...  # fmt: skip
    @overload
    @staticmethod
    def from_schema(
        name: str, json_schema: Mapping[str, Any], call: Callable[..., Coroutine[Any, Any, R]], *, description: str = "",
        **options: Unpack[ToolOptions],
    ) -> "AsyncTool[..., R]": ...  # fmt: skip
    @overload
    @staticmethod
    def from_schema(
        name: str, json_schema: Mapping[str, Any], call: Callable[..., R], *, description: str = "",
        **options: Unpack[ToolOptions],
    ) -> "Tool[..., R]": ...  # fmt: skip
    @staticmethod
    def from_schema(
        name: str, json_schema: Mapping[str, Any], call: Callable[..., Any], *, description: str = "",
        **options: Unpack[ToolOptions],
    ) -> "Tool[..., Any]":  # fmt: skip
        """A tool whose arguments a JSON Schema describes: of an MCP server, an OpenAPI operation, a function in a database.

        Args:
            json_schema: of an object with the arguments; a model is shown it as it is, and every call is held to it.
            call: `def` or `async def`, called with the arguments by name: `**arguments`, or a parameter for each. What
                it is annotated to return is the type of the step's value. A parameter annotated `ToolContext` is given
                that, and is not an argument.
            description: what the model reads.
            options: see ToolOptions.

        Raises:
            ToolSignatureError: it is not the JSON Schema of an object, or `call` does not take what it describes.
        """
        # jsonschema takes 45 ms to load, and few programs have such tools
        from agentmesh.definitions.schema_parameters import SchemaParameters

        try:
            takes = _parameters_of(call)
            closed = not any(p.kind is p.VAR_KEYWORD for p in takes.values())
            parameters = SchemaParameters(json_schema, returns=_returned_type(call), closed=closed)
        except ToolSignatureError as e:
            raise ToolSignatureError(f"tool `{name}`: {e.message}", hint=e.hint) from None
        except TypeError as e:
            raise ToolSignatureError(f"tool `{name}`: {e}") from None
        if hidden := [p.name for p in takes.values() if p.kind is p.POSITIONAL_ONLY]:
            raise ToolSignatureError(
                f"tool `{name}`: its function takes {hidden[0]!r} only by position",
                hint="remove the `/`, or wrap it in a `def`",
            )
        if closed and (missing := sorted(parameters.names - takes.keys())):
            raise ToolSignatureError(
                f"tool `{name}`: its function has no parameter {missing[0]!r}", hint="add it, or take `**arguments`"
            )
        make = AsyncTool if inspect.iscoroutinefunction(call) else Tool
        new_tool: Tool[..., Any] = make(call, name=name, description=description, parameters=parameters, **options)
        if clash := sorted(parameters.names & {*new_tool.context}):
            raise ToolSignatureError(
                f"tool `{name}`: argument {clash[0]!r} is also its ToolContext", hint="rename the parameter"
            )
        return new_tool

    def __repr__(self) -> str:
        return f"<tool {self.name}>"


class AsyncTool(Tool[P, R_co]):
    """A tool that is an `async def`: called, it gives a coroutine; its step's value is what that returns."""

    # A Tool in everything but its direct call, which only the caller who knows this class makes.
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:  # type: ignore[override]
        coroutine: Coroutine[Any, Any, R_co] = self.func(*args, **kwargs)
        return coroutine


def _make_call(tool: Tool[Any, Any], args: Any, kwargs: Any) -> Call[Any]:
    try:
        arguments = tool.parameters.bind(args, kwargs)
    except ValidationError as e:
        raise ToolSignatureError(f"tool `{tool.name}`: {explain(e)}") from None
    except (TypeError, ValueError) as e:
        raise ToolSignatureError(f"tool `{tool.name}`: {e}") from None
    except RecursionError:
        raise ToolSignatureError(f"tool `{tool.name}`: {TOO_DEEP}") from None
    return Call(tool.name, tool, arguments)


def _is_small(value: object) -> bool:
    return type(value) in (int, float, bool, NoneType) or (type(value) is str and len(value) <= MAX_CACHED_CHARS)


@lru_cache(maxsize=4096, typed=True)  # 1, 1.0 and True are three calls
def _cached_call(tool: Tool[Any, Any], /, *args: Any, **kwargs: Any) -> Call[Any]:
    """Cached, because every replay of a flow makes the same calls."""
    return _make_call(tool, args, kwargs)


def _cached_call_from_json(tool: Tool[Any, Any], arguments: str) -> Call[Any]:
    """Cached, because every replay of a flow parses the same calls."""
    call = _CALLS.get((tool, arguments))
    if call is None:
        call = _parse_call(tool, arguments)
        _CALLS.put((tool, arguments), call)
    return call


def _call_bytes(key: tuple[Tool[Any, Any], str], _: Call[Any]) -> int:
    return 1024 + 3 * getsizeof(key[1])  # the text, what it was parsed to, and the step's canonical form of it


_CALLS: SizedCache[tuple[Tool[Any, Any], str], Call[Any]] = SizedCache("parsed_calls", 16 * MIB, _call_bytes)


def _parse_call(tool: Tool[Any, Any], arguments: str) -> Call[Any]:
    try:
        parsed = json.loads(arguments or "{}")
        if not isinstance(parsed, dict):
            raise ValueError(f"the arguments are {type(parsed).__name__}, not an object")
        tool.parameters.parse(parsed)
    except RecursionError:  # in Python 3.11 after about 900 levels
        raise ValueError(TOO_DEEP) from None
    return Call(tool.name, tool, parsed)


def _context_parameters(func: Callable[..., Any], name: str) -> list[str]:
    parameters = []
    for parameter, annotation in getattr(func, "__annotations__", {}).items():
        if annotation is ToolContext or (isinstance(annotation, str) and annotation.split(".")[-1] == "ToolContext"):
            parameters.append(parameter)
    if len(parameters) > 1:
        raise ToolSignatureError(
            f"tool `{name}` has {len(parameters)} parameters annotated ToolContext: {', '.join(parameters)}",
            hint="keep one",
        )
    return parameters


def _parameters_of(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(call).parameters
    except ValueError:  # of a function written in C
        raise ToolSignatureError("the parameters of its function are unknown", hint="wrap it in a `def`") from None


def _returned_type(call: Callable[..., Any]) -> Any:
    try:
        return get_type_hints(call).get("return", Any)
    except (TypeError, NameError):  # a partial or another object; a name that is not there
        return Any


# What returns Any would match the overload for coroutines; the one for Never, which Any matches too, comes before it.
class _ToolDecorator(Protocol):
    """What `@tool(…)` is before it has its function."""

    @overload
    def __call__(self, func: Callable[P, Never], /) -> Tool[P, Any]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, func: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTool[P, R]: ...
    @overload
    def __call__(self, func: Callable[P, R], /) -> Tool[P, R]: ...


@overload
def tool(func: Callable[P, Never], /) -> Tool[P, Any]: ...  # type: ignore[overload-overlap]
@overload
def tool(func: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTool[P, R]: ...
@overload
def tool(func: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(*, name: str = ..., **options: Unpack[ToolOptions]) -> _ToolDecorator: ...
def tool(func: Callable[..., Any] | None = None, /, *, name: str = "", **options: Unpack[ToolOptions]) -> Any:
    """Make a typed function a tool: `@tool` or `@tool(timeout_s=20, retries=2)`.

    Its docstring is what the model reads. The parameters are described there, in the style of Google, NumPy, reST or
    Epydoc, or by `Annotated[str, Field(description="…")]`.

    Args:
        name: what the model calls it; the function's own name when left out.
        options: see ToolOptions.

    Raises:
        ToolSignatureError: a parameter has no type, or one without a JSON form.
    """

    def make(function: Callable[..., Any]) -> Tool[..., Any]:
        kind = AsyncTool if inspect.iscoroutinefunction(function) else Tool
        return kind(function, name=name, **options)

    return make if func is None else make(func)


class NotDone:
    """What `reconcile` returns when the outside world knows nothing of the key: the tool is called again."""


class Unknown:
    """What `reconcile` returns when it cannot tell: a person must."""
