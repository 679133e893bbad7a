"""Types to JSON Schema, values to JSON and back, by pydantic."""

import hashlib
import json
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
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
    is_plain = value is None or type(value) in (int, bool) or (type(value) is str and value.isascii())
    if is_plain and kind in (Any, type(value)):
        return value
    try:
        plain = adapter(kind).dump_python(value, mode="json", warnings="error")
        to_json_bytes(plain)  # fails for half of a surrogate pair, which UTF-8 does not have
    except (ValueError, TypeError) as e:  # PydanticSerializationError is a ValueError
        raise TypeError(f"{_brief(value)} ({type(value).__name__}) is not JSON: {e}") from None
    return plain


def from_json(data: Any, kind: Any) -> Any:
    """The value of type `kind` that plain JSON stands for.

    Raises:
        pydantic.ValidationError: the data does not fit the type.
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
    """Compact JSON text of plain values, to be stored; `canonical` is for what is compared."""
    return to_json_bytes(data).decode()


def loads(text: str | bytes) -> Any:
    """Plain values from JSON text."""
    return parse_json(text, cache_strings="keys")


def canonical(data: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(*parts: Any) -> str:
    """A short fingerprint of JSON values: 16 hex digits of BLAKE2b."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=8).hexdigest()


def explain(error: ValidationError) -> str:
    """What is wrong with a value, in one line for a model or a person."""
    return "; ".join(
        f"{'.'.join(str(p) for p in e['loc']) or 'value'}: {e['msg']}" for e in error.errors(include_url=False)[:5]
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
