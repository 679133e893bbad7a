"""What a tool takes, from a JSON Schema. Loads jsonschema, so only `Tool.from_schema` imports it."""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from agentmesh.errors import ToolSignatureError
from agentmesh.schema import to_json

MAX_PROBLEMS, MAX_PROBLEM_CHARS = 5, 300  # in the message about arguments that do not fit


class SchemaParameters:
    """Parameters that a JSON Schema describes; the arguments stay the plain JSON that they are.

    Args:
        schema: an object's schema, of the draft that its `$schema` names, or 2020-12; kept as it is. Nothing that it
            refers to is fetched.
        returns: the type of the tool's value.
        closed: only arguments that `properties` names are taken, whatever the schema says of others.

    Raises:
        ToolSignatureError: it is not a JSON Schema, or not that of an object.
        TypeError: it is not JSON.

    Source: https://json-schema.org/draft/2020-12
    """

    def __init__(self, schema: Mapping[str, Any], *, returns: Any = Any, closed: bool = False) -> None:
        if not isinstance(schema, Mapping):
            raise ToolSignatureError(f"its JSON Schema is a {type(schema).__name__}", hint="give it as a dict")
        self.schema: dict[str, Any] = to_json(dict(schema))
        self.returns, self._closed = returns, closed
        if self.schema.get("type") != "object":
            raise ToolSignatureError("its JSON Schema is not that of an object", hint='give it "type": "object"')
        validator = validator_for(self.schema, default=Draft202012Validator)
        try:
            validator.check_schema(self.schema)
        except SchemaError as e:
            raise ToolSignatureError(f"its JSON Schema is not valid at {e.json_path}: {_brief(e.message)}") from None
        self.names = frozenset(self.schema.get("properties", ())) | frozenset(self.schema.get("required", ()))
        self._validator = validator(self.schema, registry=Registry())

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """See Parameters."""
        if args:
            raise TypeError("its arguments are given by name")
        return self.parse(to_json(dict(kwargs)))

    def parse(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """See Parameters."""
        try:
            problems = [
                f"{'.'.join(str(key) for key in e.absolute_path) or 'arguments'}: {_brief(e.message)}"
                for e in islice(self._validator.iter_errors(arguments), MAX_PROBLEMS)
            ]
        except Unresolvable as e:
            raise ValueError(f"the JSON Schema refers to {e.ref!r}, which it does not hold") from None
        if self._closed:
            problems += [f"{name}: there is no such argument" for name in arguments.keys() - self.names]
        if problems:
            raise ValueError("; ".join(sorted(problems)))
        return json.loads(json.dumps(arguments))  # type: ignore[no-any-return]  # the tool's own: it may change them


def _brief(text: str) -> str:
    return text if len(text) <= MAX_PROBLEM_CHARS else f"{text[:MAX_PROBLEM_CHARS]}…"
