"""Filters in Mongo's words: checked once, then asked of a row or, in `columns`, of a whole segment at a time.

A field that is absent matches `$ne`, `$nin` and `{"$exists": false}` only; `$not` turns an answer round.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from agentmesh.errors import FilterInvalid, did_you_mean

OPERATORS = ("$eq", "$ne", "$in", "$nin", "$gt", "$gte", "$lt", "$lte", "$exists")
COMBINERS = ("$and", "$or", "$not")
ABSENT_MATCHES = ("$ne", "$nin")

Scalar = str | int | float | bool | datetime


@dataclass(frozen=True, slots=True)
class Condition:
    """One operator on one field; `value` is a scalar, for `$in` and `$nin` a tuple of them, for `$exists` a bool."""

    field: str
    op: str
    value: Any


@dataclass(frozen=True, slots=True)
class Combination:
    """`$and`, `$or` or `$not` of other filters."""

    op: str
    parts: "tuple[FilterExpr, ...]"


FilterExpr = Condition | Combination


def parse(where: object) -> FilterExpr:
    """The filter behind Mongo's words, or what is wrong with them.

    >>> parse({"year": {"$gte": 2020}, "tenant": "a"})  # doctest: +ELLIPSIS
    Joined(op='$and', parts=(Check(field='year', op='$gte', value=2020), Check(field='tenant', op='$eq', value='a')))

    Raises:
        FilterInvalid: a callable, an unknown operator, or a value of another type than a field can have.
    """
    if isinstance(where, Condition | Combination):
        return where
    if callable(where):
        raise FilterInvalid('a filter is data, such as {"year": {"$gte": 2020}}', hint="a function cannot be one")
    if not isinstance(where, Mapping):
        raise FilterInvalid(f"a filter is a mapping of fields to values, not {type(where).__name__}")
    parts = [part for key, value in where.items() for part in _parse_entry(key, value)]
    return parts[0] if len(parts) == 1 else Combination("$and", tuple(parts))


def intersect(a: FilterExpr | None, b: FilterExpr | None) -> FilterExpr | None:
    """What passes the two filters; None passes everything."""
    if a is None or b is None:
        return a if b is None else b
    return Combination("$and", (a, b))


def _parse_entry(key: object, value: object) -> list[FilterExpr]:
    if not isinstance(key, str):
        raise FilterInvalid(f"a field's name is text, not {key!r}")
    if key == "$not":
        return [Combination("$not", (parse(value),))]
    if key in COMBINERS:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise FilterInvalid(f"{key} takes a list of filters, not {value!r}")
        return [Combination(key, tuple(parse(part) for part in value))]
    if key.startswith("$"):
        raise FilterInvalid(f"unknown operator {key!r}.{did_you_mean(key, (*OPERATORS, *COMBINERS))}")
    if not isinstance(value, Mapping):
        return [Condition(key, "$eq", _scalar(key, value))]
    if not value:
        raise FilterInvalid(f"the filter of {key!r} is empty", hint=f'write {{"{key}": {{"$eq": …}}}}')
    return [_parse_condition(key, op, operand) for op, operand in value.items()]


def _parse_condition(field: str, op: object, operand: object) -> FilterExpr:
    if op == "$not":
        if not isinstance(operand, Mapping):
            raise FilterInvalid(f"$not of {field!r} takes operators, not {operand!r}")
        return Combination("$not", (parse({field: operand}),))
    if op not in OPERATORS:
        raise FilterInvalid(f"unknown operator {op!r} on {field!r}.{did_you_mean(str(op), (*OPERATORS, '$not'))}")
    if op == "$exists":
        if not isinstance(operand, bool):
            raise FilterInvalid(f"$exists of {field!r} takes true or false, not {operand!r}")
        return Condition(field, op, operand)
    if op in ("$in", "$nin"):
        if isinstance(operand, str) or not isinstance(operand, Sequence | set | frozenset):
            raise FilterInvalid(f"{op} of {field!r} takes a list, not {operand!r}")
        return Condition(field, str(op), tuple(_scalar(field, one) for one in operand))
    return Condition(field, str(op), _scalar(field, operand))


def _scalar(field: str, value: object) -> Scalar:
    if callable(value):
        raise FilterInvalid("a filter is data", hint=f"{field!r} was given a function")
    if isinstance(value, datetime):
        return utc(value)
    if isinstance(value, str | bool | int | float) and not (isinstance(value, float) and math.isnan(value)):
        return value
    raise FilterInvalid(
        f"{field!r} cannot be compared with {value!r}: a str, int, float, bool or datetime is needed",
        hint="of several, $in",
    )


def utc(value: datetime) -> datetime:
    """The same moment in UTC; one without a timezone is taken for UTC."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def family(value: object) -> str:
    """Values are compared within a family only: int and float are one, bool is its own."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return type(value).__name__


def conditions(where: FilterExpr) -> Iterator[Condition]:
    """Every test in a filter."""
    if isinstance(where, Condition):
        yield where
    else:
        for part in where.parts:
            yield from conditions(part)


def matches(where: FilterExpr, row: Mapping[str, Any]) -> bool:
    """Whether one row's fields pass.

    >>> matches(parse({"tags": "b", "year": {"$ne": 3}}), {"tags": ["a", "b"]})
    True
    """
    if isinstance(where, Combination):
        answers = (matches(part, row) for part in where.parts)
        return {"$and": all, "$or": any}.get(where.op, lambda a: not next(a))(answers)
    if where.op == "$exists":
        return (where.field in row) is where.value
    if where.field not in row:
        return where.op in ABSENT_MATCHES
    value = row[where.field]
    values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    values = [utc(v) if isinstance(v, datetime) else v for v in values]
    if where.op in ("$eq", "$ne"):
        return any(_same(v, where.value) for v in values) is (where.op == "$eq")
    if where.op in ("$in", "$nin"):
        return any(_same(v, w) for v in values for w in where.value) is (where.op == "$in")
    if isinstance(value, list | tuple):
        return False  # a list has no order
    return family(values[0]) == family(where.value) and bool(COMPARE[where.op](values[0], where.value))


def _same(a: object, b: object) -> bool:
    return family(a) == family(b) and a == b


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "$gt": lambda a, b: a > b,
    "$gte": lambda a, b: a >= b,
    "$lt": lambda a, b: a < b,
    "$lte": lambda a, b: a <= b,
}


def described(where: FilterExpr) -> str:
    """A filter as one line, for messages and as a key."""
    if isinstance(where, Condition):
        return f"{where.field} {where.op} {json.dumps(where.value, default=str, ensure_ascii=False)}"
    return f"{where.op}({', '.join(described(p) for p in where.parts)})"
