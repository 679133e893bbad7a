"""Types to JSON Schema and JSON to types: the one place where pydantic is asked."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import from_json as parse_json
from pydantic_core import to_json as to_json_bytes


@lru_cache(maxsize=1024)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def adapter(kind: Any) -> TypeAdapter[Any]:
    """pydantic's adapter of a type, made once."""
    try:
        return _adapter(kind)
    except TypeError:  # unhashable annotations, such as Annotated[..., {...}]
        return TypeAdapter(kind)


def to_json(value: Any, kind: Any = Any) -> Any:
    """A value as plain JSON (dict, list, str, numbers, bool, None).

    Raises:
        TypeError: it has no JSON form.
    """
    if (value is None or type(value) in (str, int, bool)) and kind in (Any, type(value)):
        return value
    try:
        plain = adapter(kind).dump_python(value, mode="json", warnings="error")
    except (ValueError, TypeError) as e:  # PydanticSerializationError is a ValueError
        raise TypeError(f"{_brief(value)} ({type(value).__name__}) is not JSON: {e}") from None
    return plain


def from_json(data: Any, kind: Any) -> Any:
    """The value of type `kind` that plain JSON stands for.

    Raises:
        pydantic.ValidationError: it is not one.
    """
    if kind is str and type(data) is str:
        return data
    if kind is Any:
        return data
    return adapter(kind).validate_json(json.dumps(data), strict=False)


def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a type."""
    return adapter(kind).json_schema()


def dumps(data: Any) -> str:
    """Compact JSON text of plain values; for what is stored, not for what is compared."""
    return to_json_bytes(data).decode()


def loads(text: str | bytes) -> Any:
    """Plain values from JSON text."""
    return parse_json(text, cache_strings="keys")


def canonical(data: Any) -> str:
    """JSON text that equal values share: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(*parts: Any) -> str:
    """A short fingerprint of JSON values: 16 hex digits of BLAKE2b."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=8).hexdigest()


def explain(error: ValidationError) -> str:
    """What is wrong with a value, in one line a model or a person can act on."""
    return "; ".join(
        f"{'.'.join(str(p) for p in e['loc']) or 'value'}: {e['msg']}" for e in error.errors(include_url=False)[:5]
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Parameters:
    """The parameters of a function as a pydantic model, without those named in `hidden`.

    Raises:
        TypeError: a parameter has no type, or one that has no JSON Schema.
    """

    def __init__(self, func: Callable[..., Any], *, hidden: frozenset[str] = frozenset()) -> None:
        whole = inspect.signature(func)
        self.signature = whole.replace(parameters=[p for name, p in whole.parameters.items() if name not in hidden])
        hints = get_type_hints(func, include_extras=True)
        self.returns = hints.get("return", Any)
        docs = parameter_docs(inspect.getdoc(func) or "")
        definitions: dict[str, Any] = {}
        for name, p in self.signature.parameters.items():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise TypeError(f"parameter `*{name}` has no fixed form; name each parameter")
            if name not in hints:
                raise TypeError(f"parameter `{name}` has no type; write `{name}: str`, or whatever it is")
            definitions[name] = (hints[name], _field(p, docs.get(name)))
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
        try:
            self.model: type[BaseModel] = create_model(func.__name__, __config__=config, **definitions)
            self.schema = _without_titles(self.model.model_json_schema())
        except PydanticSchemaGenerationError as e:
            raise TypeError(str(e).splitlines()[0]) from None

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments as plain JSON by name; defaults stay out.

        Raises:
            TypeError: the call does not fit the signature.
            pydantic.ValidationError: a value does not fit its type.
        """
        value = self.model(**self.signature.bind(*args, **kwargs).arguments)
        return value.model_dump(mode="json", exclude_unset=True, warnings="error")

    def parse(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Typed arguments by name from plain JSON.

        Raises:
            pydantic.ValidationError: they do not fit.
        """
        value = self.model.model_validate_json(json.dumps(arguments))
        return {name: getattr(value, name) for name in type(value).model_fields}


def _field(p: inspect.Parameter, doc: str | None) -> Any:
    default = ... if p.default is p.empty else p.default
    return Field(default, description=doc)


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    """Without pydantic's titles, which cost a model tokens and tell it nothing."""
    drop = {k: v for k, v in schema.items() if k != "title" or not isinstance(v, str)}
    for key in ("properties", "$defs"):
        if key in drop:
            drop[key] = {name: _without_titles(sub) for name, sub in drop[key].items()}
    return drop


def parameter_docs(doc: str) -> dict[str, str]:
    """What a Google-style `Args:` section says of each parameter."""
    docs: dict[str, str] = {}
    name, inside = "", False
    for line in doc.splitlines():
        text = line.strip()
        if text in ("Args:", "Arguments:", "Parameters:"):
            inside = True
        elif inside and text and not line.startswith(" "):
            break
        elif inside and text:
            head, colon, rest = text.partition(":")
            word = head.split("(")[0].strip()
            if colon and word.isidentifier() and len(line) - len(line.lstrip()) <= 4:
                name, docs[word] = word, rest.strip()
            elif name:
                docs[name] += f" {text}"
    return docs


def summary(doc: str) -> str:
    """A docstring without its sections."""
    lines: list[str] = []
    for line in doc.splitlines():
        if line.strip() in ("Args:", "Arguments:", "Parameters:", "Returns:", "Raises:", "Source:"):
            break
        lines.append(line)
    return "\n".join(lines).strip()
