"""Filters in MongoDB's syntax: parsed once, then tested against one row, or in `columns` against a whole segment.

A field that is absent matches only `$ne`, `$nin` and `{"$exists": false}`; `$not` negates.
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


def parse_filter(where: object) -> FilterExpr:
    """The filter that a mapping describes.

    >>> parse_filter({"year": {"$gte": 2020}})
    Condition(field='year', op='$gte', value=2020)
    >>> [part.field for part in parse_filter({"year": {"$gte": 2020}, "tenant": "a"}).parts]
    ['year', 'tenant']

    Raises:
        FilterInvalid: it is not a mapping, or has an unknown operator or a value of a type that no field can have.
    """
    if isinstance(where, Condition | Combination):
        return where
    if not isinstance(where, Mapping):
        kind = "function" if callable(where) else type(where).__name__
        raise FilterInvalid(
            f"a filter is a mapping of fields to values, not a {kind}",
            hint='write one such as {"year": {"$gte": 2020}}',
        )
    parts = [part for key, value in where.items() for part in _parse_entry(key, value)]
    return parts[0] if len(parts) == 1 else Combination("$and", tuple(parts))


def intersect(a: FilterExpr | None, b: FilterExpr | None) -> FilterExpr | None:
    """The filter that passes what both pass; None passes everything."""
    if a is None or b is None:
        return a if b is None else b
    return Combination("$and", (a, b))


def _parse_entry(key: object, value: object) -> list[FilterExpr]:
    if not isinstance(key, str):
        raise FilterInvalid(f"the name of a field is a str, not {key!r}")
    if key == "$not":
        return [Combination("$not", (parse_filter(value),))]
    if key in COMBINERS:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise FilterInvalid(f"{key} takes a list of filters, not {value!r}")
        return [Combination(key, tuple(parse_filter(part) for part in value))]
    if key.startswith("$"):
        raise FilterInvalid(f"unknown operator {key!r}", hint=_one_of(key, COMBINERS))
    if not isinstance(value, Mapping):
        return [Condition(key, "$eq", _scalar(key, value))]
    if not value:
        raise FilterInvalid(f"the filter of {key!r} is empty", hint=f'write {{"{key}": {{"$eq": …}}}}')
    return [_parse_condition(key, op, operand) for op, operand in value.items()]


def _one_of(name: str, names: Sequence[str]) -> str:
    return f"use one of: {', '.join(names)}.{did_you_mean(name, names)}"


def _parse_condition(field: str, op: object, operand: object) -> FilterExpr:
    if op == "$not":
        if not isinstance(operand, Mapping):
            raise FilterInvalid(f"$not of {field!r} takes operators, not {operand!r}")
        return Combination("$not", (parse_filter({field: operand}),))
    if op not in OPERATORS:
        raise FilterInvalid(f"unknown operator {op!r} on {field!r}", hint=_one_of(str(op), (*OPERATORS, "$not")))
    if op == "$exists":
        if not isinstance(operand, bool):
            raise FilterInvalid(f"$exists of {field!r} takes true or false, not {operand!r}")
        return Condition(field, op, operand)
    if op in ("$in", "$nin"):
        if isinstance(operand, str) or not isinstance(operand, Sequence | set | frozenset):
            raise FilterInvalid(f"{op} of {field!r} takes a list, not {operand!r}")
        return Condition(field, str(op), tuple(_scalar(field, element) for element in operand))
    return Condition(field, str(op), _scalar(field, operand))


def _scalar(field: str, value: object) -> Scalar:
    if isinstance(value, datetime):
        return utc(value)
    if isinstance(value, str | bool | int | float) and not (isinstance(value, float) and math.isnan(value)):
        return value
    shown = "a function" if callable(value) else repr(value)
    raise FilterInvalid(
        f"{field!r} cannot be compared with {shown}",
        hint="compare it with a str, int, float, bool or datetime, or with several by $in",
    )


def utc(value: datetime) -> datetime:
    """The same time in UTC; a datetime without a timezone is taken to be in UTC."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def family(value: object) -> str:
    """The family of types that a value is compared within: int and float are one, bool is another."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return type(value).__name__


def conditions(where: FilterExpr) -> Iterator[Condition]:
    """Every condition in a filter."""
    if isinstance(where, Condition):
        yield where
    else:
        for part in where.parts:
            yield from conditions(part)


def matches(where: FilterExpr, row: Mapping[str, Any]) -> bool:
    """Whether the fields of one row pass a filter.

    >>> matches(parse_filter({"tags": "b", "year": {"$ne": 3}}), {"tags": ["a", "b"]})
    True
    """
    if isinstance(where, Combination):
        results = (matches(part, row) for part in where.parts)
        return {"$and": all, "$or": any}.get(where.op, lambda r: not next(r))(results)
    if where.op == "$exists":
        return (where.field in row) is where.value
    if where.field not in row:
        return where.op in ABSENT_MATCHES
    value = row[where.field]
    values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    values = [utc(v) if isinstance(v, datetime) else v for v in values]
    if where.op in ("$eq", "$ne"):
        return any(_equal(v, where.value) for v in values) is (where.op == "$eq")
    if where.op in ("$in", "$nin"):
        return any(_equal(v, w) for v in values for w in where.value) is (where.op == "$in")
    if isinstance(value, list | tuple):
        return False  # a list has no order
    return family(values[0]) == family(where.value) and bool(COMPARE[where.op](values[0], where.value))


def _equal(a: object, b: object) -> bool:
    return family(a) == family(b) and a == b


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "$gt": lambda a, b: a > b,
    "$gte": lambda a, b: a >= b,
    "$lt": lambda a, b: a < b,
    "$lte": lambda a, b: a <= b,
}


def describe(where: FilterExpr) -> str:
    """A filter as one line: the key under which a segment caches its result."""
    if isinstance(where, Condition):
        return f"{where.field} {where.op} {json.dumps(where.value, default=str, ensure_ascii=False)}"
    return f"{where.op}({', '.join(describe(p) for p in where.parts)})"
