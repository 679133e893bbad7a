"""What a subclass of Agent says of itself, read when the class is made: its types, its fields."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Union

from pydantic import BaseModel, ConfigDict, create_model

from agentmesh.errors import DefinitionError
from agentmesh.schema import json_schema


class Undeclared:
    """Marks a type that a class does not give, so that it is told from one that it gives and is the default."""


def type_arguments(cls: type, root: type, inherited: tuple[Any, Any]) -> tuple[Any, Any]:
    """The output and task types that a class gives to `root`, or to a generic subclass of it; else the inherited ones.

    Args:
        inherited: what the class's base has, with its TypeVars.
    """
    for base in cls.__dict__.get("__orig_bases__", ()):
        origin = typing.get_origin(base)
        if not (isinstance(origin, type) and issubclass(origin, root)):
            continue
        arguments = typing.get_args(base)
        if origin is root:
            output, *rest = arguments
            is_declared = rest and Undeclared not in getattr(rest[0], "__metadata__", ())
            return output, rest[0] if is_declared else Undeclared
        filled = dict(zip(getattr(origin, "__parameters__", ()), arguments, strict=False))
        return _substitute(inherited[0], filled), _substitute(inherited[1], filled)
    return inherited


def task_type(cls: type, flow: Callable[..., Any] | None, declared: Any) -> Any:
    """The type of an agent's task: what the class gives, what its flow takes, or text.

    Args:
        flow: the class's own; None for the default one.
        declared: the type argument of the class, as `type_arguments` returns it.

    Raises:
        DefinitionError: both are declared, and the flow does not take what the class gives.
    """
    is_declared = declared is not Undeclared and not is_open(declared)
    annotated = Undeclared if flow is None else _flow_parameter(cls, flow)
    if annotated is Undeclared or (is_declared and is_open(annotated)):
        return declared if is_declared else str
    if not is_declared or declared is Any:
        return annotated
    if not _accepts(annotated, declared):
        raise DefinitionError(
            f"agent `{cls.__name__}` takes {type_name(declared)} and its flow {type_name(annotated)}",
            hint=f"write the same type in `Agent[…, {type_name(declared)}]` and in the flow",
        )
    return declared


def type_hints(cls: type) -> dict[str, Any]:
    """The annotations of a class and its bases.

    Raises:
        DefinitionError: one names something that is not there.
    """
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError as e:
        raise DefinitionError(f"agent `{cls.__name__}`: {e}") from None


def fields_model(cls: type, own_words: Mapping[str, Any]) -> type[BaseModel]:
    """The typed fields of an agent: what its classes annotate beyond Agent's own words.

    Raises:
        DefinitionError: a field's type has no JSON form.
    """
    definitions: dict[str, Any] = {}
    for name, hint in type_hints(cls).items():
        if name.startswith("_") or name in own_words or typing.get_origin(hint) is ClassVar:
            continue
        definitions[name] = (hint, getattr(cls, name, ...))
    try:
        return create_model(cls.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **definitions)
    except Exception as e:
        raise DefinitionError(
            f"agent `{cls.__name__}`: its fields have no JSON form: {str(e).splitlines()[0]}"
        ) from None


def check_type(cls: type, what: str, kind: Any) -> None:
    """Nothing, where a type has a JSON Schema, or is still open in a generic class.

    Raises:
        DefinitionError: it has none.
    """
    if is_open(kind):
        return
    try:
        json_schema(kind)
    except Exception as e:
        raise DefinitionError(
            f"agent `{cls.__name__}`: its {what} {type_name(kind)} has no JSON Schema: {str(e).splitlines()[0]}"
        ) from None


def type_name(kind: Any) -> str:
    """A type as one writes it."""
    return str(kind) if typing.get_args(kind) else getattr(kind, "__name__", None) or str(kind)


def _flow_parameter(cls: type, flow: Callable[..., Any]) -> Any:
    """What a flow is annotated to take."""
    parameters = list(inspect.signature(flow).parameters)
    if len(parameters) != 3:
        raise DefinitionError(
            f"agent `{cls.__name__}`: its flow takes {parameters}", hint="write `def flow(self, task, ctx)`"
        )
    if inspect.iscoroutinefunction(flow) or inspect.isgeneratorfunction(flow):
        raise DefinitionError(
            f"agent `{cls.__name__}`: its flow is not a plain `def`", hint="wait with ctx.do and ctx.gather instead"
        )
    try:
        return typing.get_type_hints(flow).get(parameters[1], Undeclared)
    except NameError as e:
        raise DefinitionError(f"agent `{cls.__name__}`, flow: {e}") from None


def is_open(kind: Any) -> bool:
    """Whether a type has TypeVars, which a subclass will fill."""
    return isinstance(kind, typing.TypeVar) or bool(getattr(kind, "__parameters__", ()))


def _substitute(kind: Any, filled: Mapping[Any, Any]) -> Any:
    if isinstance(kind, typing.TypeVar):
        return filled.get(kind, kind)
    parameters = getattr(kind, "__parameters__", ())
    return kind[tuple(filled.get(p, p) for p in parameters)] if parameters else kind


def _accepts(wide: Any, narrow: Any) -> bool:
    """Whether a parameter annotated `wide` takes a `narrow`, as far as can be seen from the two; equal types it does."""
    if wide in (Any, object) or wide == narrow:
        return True
    unions = (Union, types.UnionType)
    if typing.get_origin(narrow) in unions:
        return all(_accepts(wide, one) for one in typing.get_args(narrow))
    if typing.get_origin(wide) in unions:
        return any(_accepts(one, narrow) for one in typing.get_args(wide))
    outer, inner = typing.get_origin(wide) or wide, typing.get_origin(narrow) or narrow
    if not (isinstance(outer, type) and isinstance(inner, type) and issubclass(inner, outer)):
        return False
    pairs = zip(typing.get_args(wide), typing.get_args(narrow), strict=False)
    return all(_accepts(one, other) for one, other in pairs)
