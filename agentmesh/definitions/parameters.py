"""What a tool takes, from its function's signature and docstring. JSON in, arguments out."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, get_type_hints

from docstring_parser import parse as parse_docstring
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, create_model
from pydantic.fields import FieldInfo

from agentmesh.errors import ToolSignatureError


class Parameters(Protocol):
    """The parameters of a tool.

    Args:
        schema: a JSON Schema object: what a model is shown.
        returns: the type of the tool's value.
    """

    schema: dict[str, Any]
    returns: Any

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call in Python as plain JSON by name; defaults stay out.

        Raises:
            TypeError: the call does not fit the signature.
            ValueError: a value does not fit (pydantic.ValidationError is one).
        """
        ...

    def parse(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, ready for the function, from plain JSON.

        Raises:
            ValueError: they do not fit (pydantic.ValidationError is one).
        """
        ...


class FunctionParameters:
    """The parameters of a function as a pydantic model, without those named in `hidden`.

    A description in `Annotated[…, Field(description=…)]` comes before that of the docstring, which may be written in the
    style of Google, NumPy, reST or Epydoc.

    Raises:
        ToolSignatureError: a parameter has no type, or one that has no JSON Schema.
    """

    def __init__(self, func: Callable[..., Any], *, hidden: frozenset[str] = frozenset()) -> None:
        if not (inspect.isroutine(func) or inspect.isclass(func)):
            raise _not_a_function(func)
        whole = inspect.signature(func)
        self.signature = whole.replace(parameters=[p for name, p in whole.parameters.items() if name not in hidden])
        hints = get_type_hints(func, include_extras=True)
        self.returns = hints.get("return", Any)
        _, docs = read_docstring(inspect.getdoc(func) or "")
        definitions: dict[str, Any] = {}
        for name, p in self.signature.parameters.items():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise ToolSignatureError(f"parameter `*{name}` has no fixed form", hint="name each parameter")
            if name in ("self", "cls") and name not in hints:
                raise ToolSignatureError(
                    f"it is a method, whose `{name}` a step does not have",
                    hint="make a tool of the bound one: tool(object.method)",
                )
            if name not in hints:
                raise ToolSignatureError(f"parameter `{name}` has no type", hint=f"write `{name}: str`, or what it is")
            if name == "model_config":
                raise ToolSignatureError("parameter `model_config` is not allowed", hint="rename it")
            definitions[name] = (hints[name], _field(p, hints[name], docs.get(name)))
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=False, populate_by_name=True)
        try:
            self.model: type[BaseModel] = create_model(func.__name__, __config__=config, **definitions)
            self.schema = _without_titles(self.model.model_json_schema())
        except (PydanticUserError, ValueError) as e:  # the latter for a name that pydantic keeps to itself
            raise ToolSignatureError(str(e).splitlines()[0], hint="rename the parameter, or change its type") from None

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """See Parameters."""
        value = self.model(**self.signature.bind(*args, **kwargs).arguments)
        return value.model_dump(mode="json", exclude_unset=True, warnings="error")

    def parse(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """See Parameters."""
        value = self.model.model_validate_json(json.dumps(arguments))
        return {name: getattr(value, name) for name in type(value).model_fields}


def function_name(func: Callable[..., Any]) -> str:
    """The name that a function was defined with.

    Raises:
        ToolSignatureError: it is another object, such as a partial.
    """
    name = getattr(func, "__name__", None)
    if not isinstance(name, str):
        raise _not_a_function(func)
    return name


def read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the whole, and of each parameter: (description, by name).

    The style is recognised: Google, NumPy, reST or Epydoc. Examples belong to the description.

    >>> read_docstring("Add.\\n\\nArgs:\\n    a: one number.\\n    b: another,\\n        or the same.")
    ('Add.', {'a': 'one number.', 'b': 'another, or the same.'})
    """
    parsed = parse_docstring(doc)
    docs = {p.arg_name.strip("`*"): " ".join((p.description or "").split()) for p in parsed.params}
    about = (parsed.description or "").partition("\nSource:\n")[0]  # our own section, which no style knows
    examples = [part.strip() for e in parsed.examples for part in (e.snippet, e.description) if part]
    if examples:
        about = "\n".join([about.strip(), "\nExample:", *examples])
    return about.strip(), docs


def _not_a_function(value: object) -> ToolSignatureError:
    return ToolSignatureError(f"{value!r} is not a function", hint="wrap it in a `def`")


def _field(p: inspect.Parameter, hint: Any, doc: str | None) -> Any:
    if isinstance(p.default, FieldInfo):  # `city: str = Field(description="…")`
        return p.default
    default = ... if p.default is p.empty else p.default
    described = any(isinstance(m, FieldInfo) and m.description for m in getattr(hint, "__metadata__", ()))
    return Field(default) if described or not doc else Field(default, description=doc)


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    """Without pydantic's titles, which cost tokens and repeat the names."""
    drop = {k: v for k, v in schema.items() if k != "title" or not isinstance(v, str)}
    for key in ("properties", "$defs"):
        if key in drop:
            drop[key] = {name: _without_titles(sub) for name, sub in drop[key].items()}
    return drop
