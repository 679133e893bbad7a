"""A typed function a model may call."""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from sys import getsizeof
from types import NoneType
from typing import Any, Generic, Literal, ParamSpec, TypeVar, overload

from pydantic import ValidationError

from agentmesh.definitions.step import Call, ToolContext
from agentmesh.errors import DefinitionError, ToolSignatureError
from agentmesh.message import ToolSpec
from agentmesh.schema import Parameters, explain, summary
from agentmesh.sized_cache import MIB, SizedCache

P = ParamSpec("P")
R = TypeVar("R")
Delivery = Literal["idempotent", "at_most_once"]
TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
CACHED_CHARS = 200  # characters of an argument; calls with longer ones are not kept, which bounds the cache's bytes


class Tool(Generic[P, R]):
    """A function with what a model and the engine must know of it. Made by `@tool`.

    Called, it is the function. `.on(...)` is the step that calls it.
    """

    def __init__(
        self, func: Callable[P, R], *, name: str = "", timeout_s: float | None = None, retries: int = 0,
        delivery: Delivery = "idempotent", approve: bool = False, queue: str = "",
        reconcile: Callable[[str], Any] | None = None, max_output_bytes: int = 1 << 20,
    ) -> None:  # fmt: skip
        self.func, self.name = func, name or func.__name__
        self.timeout_s, self.retries, self.delivery = timeout_s, retries, delivery
        self.approve, self.queue, self.reconcile = approve, queue, reconcile
        self.max_output_bytes = max_output_bytes
        self.__doc__, self.__name__ = func.__doc__, self.name
        self.__module__ = func.__module__
        self._check()
        self.context = tuple(_context_parameters(func, self.name))
        try:
            self.parameters = Parameters(func, hidden=frozenset(self.context))
        except (TypeError, NameError) as e:
            raise ToolSignatureError(f"tool `{self.name}`: {e}") from None
        self.returns: Any = _unwrap_awaitable(self.parameters.returns)
        self._places = [p.name for p in inspect.signature(func).parameters.values() if p.kind is p.POSITIONAL_ONLY]
        self.spec = ToolSpec(self.name, summary(inspect.getdoc(func) or ""), self.parameters.schema)

    def _check(self) -> None:
        if not TOOL_NAME.fullmatch(self.name):
            raise DefinitionError(f"tool name {self.name!r} must be letters, digits, `_`, `-`, at most 64")
        if self.delivery not in ("idempotent", "at_most_once"):
            raise DefinitionError(
                f"tool `{self.name}`: delivery={self.delivery!r} must be 'idempotent' or 'at_most_once'"
            )
        if self.delivery == "at_most_once" and self.retries:
            raise DefinitionError(
                f"tool `{self.name}` is at_most_once and has retries={self.retries}: a retry is a second delivery",
                hint="drop one of the two",
            )
        if self.retries < 0:
            raise DefinitionError(f"tool `{self.name}`: retries={self.retries} must be 0 or more")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.func(*args, **kwargs)

    def on(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """The step that calls this tool, for `ctx.do` and `ctx.gather`.

        Raises:
            ToolSignatureError: the arguments do not fit, or are not JSON.
        """
        small = all(_is_small(a) for a in args) and all(_is_small(a) for a in kwargs.values())
        if small:
            return _cached_call(self, *args, **kwargs)  # type: ignore[arg-type]  # what is small is hashable
        return _make_call(self, args, kwargs)

    def call_from_json(self, arguments: str) -> Call[R]:
        """The step that calls this tool with the JSON a model wrote.

        Raises:
            ValueError: it is not JSON, or (pydantic.ValidationError) it does not fit.
        """
        return _cached_call_from_json(self, arguments)

    def bind(self, arguments: Mapping[str, Any], context: ToolContext) -> Callable[[], Any]:
        """The function, ready to be called with typed arguments."""
        arguments_ = self.parameters.parse(arguments) | dict.fromkeys(self.context, context)
        places = [arguments_.pop(name) for name in self._places]
        return partial(self.func, *places, **arguments_)

    def __repr__(self) -> str:
        return f"<tool {self.name}>"


def _make_call(tool: Tool[Any, Any], args: Any, kwargs: Any) -> Call[Any]:
    try:
        arguments = tool.parameters.bind(args, kwargs)
    except ValidationError as e:
        raise ToolSignatureError(f"tool `{tool.name}`: {explain(e)}") from None
    except (TypeError, ValueError) as e:
        raise ToolSignatureError(f"tool `{tool.name}`: {e}") from None
    return Call(tool.name, tool, arguments)


def _is_small(value: object) -> bool:
    return type(value) in (int, float, bool, NoneType) or (type(value) is str and len(value) <= CACHED_CHARS)


@lru_cache(maxsize=4096, typed=True)  # 1, 1.0 and True are three calls
def _cached_call(tool: Tool[Any, Any], /, *args: Any, **kwargs: Any) -> Call[Any]:
    """Cached: a flow that is replayed calls again what it called before."""
    return _make_call(tool, args, kwargs)


def _cached_call_from_json(tool: Tool[Any, Any], arguments: str) -> Call[Any]:
    """Cached: a flow that is replayed asks again for what it asked before."""
    call = _CALLS.get((tool, arguments))
    if call is None:
        call = _parse_call(tool, arguments)
        _CALLS.put((tool, arguments), call)
    return call


def _call_bytes(key: tuple[Tool[Any, Any], str], _: Call[Any]) -> int:
    return 1024 + 3 * getsizeof(key[1])  # the text, what it was parsed to, and the step's canonical form of it


_CALLS: SizedCache[tuple[Tool[Any, Any], str], Call[Any]] = SizedCache("parsed_calls", 16 * MIB, _call_bytes)


def _parse_call(tool: Tool[Any, Any], arguments: str) -> Call[Any]:
    parsed = json.loads(arguments or "{}")
    if not isinstance(parsed, dict):
        raise ValueError(f"the arguments are {type(parsed).__name__}, not an object")
    tool.parameters.parse(parsed)
    return Call(tool.name, tool, parsed)


def _context_parameters(func: Callable[..., Any], name: str) -> list[str]:
    parameters = []
    for parameter, annotation in getattr(func, "__annotations__", {}).items():
        if annotation is ToolContext or (isinstance(annotation, str) and annotation.split(".")[-1] == "ToolContext"):
            parameters.append(parameter)
    if len(parameters) > 1:
        raise ToolSignatureError(f"tool `{name}` asks for two ToolContexts: {', '.join(parameters)}")
    return parameters


def _unwrap_awaitable(returns: Any) -> Any:
    return Any if returns is inspect.Signature.empty else returns


@overload
def tool(func: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(
    *, name: str = ..., timeout_s: float | None = ..., retries: int = ..., delivery: Delivery = ...,
    approve: bool = ..., queue: str = ..., reconcile: Callable[[str], Any] | None = ..., max_output_bytes: int = ...,
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...  # fmt: skip
def tool(func: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a typed function a tool: `@tool` or `@tool(timeout_s=20, retries=2)`.

    Its docstring is what the model reads; an `Args:` section describes the parameters.

    Args:
        retries: how often an exception is tried again; not for at_most_once.
        delivery: `idempotent` may be repeated after a crash, with the same `ToolContext.key`; `at_most_once` may not.
        approve: each call waits for a person.
        reconcile: asked after a crash with the key: the tool's value, `NotDone`, or `Unknown` (a person decides).
        max_output_bytes: longer output keeps its head and tail.

    Raises:
        ToolSignatureError: a parameter has no type, or one without a JSON form.
    """
    if func is not None:
        return Tool(func)
    return lambda f: Tool(f, **options)


class NotDone:
    """What `reconcile` returns when the outside world knows nothing of the key: the tool is called again."""


class Unknown:
    """What `reconcile` returns when it cannot tell: a person must."""
