"""Metadata by column: encoded for a segment's file, read back by row, and asked a filter for all rows at once."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from agentmesh.errors import FilterInvalid, StoreError, did_you_mean
from agentmesh.rag.store.filters import (
    ABSENT_MATCHES,
    COMPARE,
    Combination,
    Condition,
    FilterExpr,
    conditions,
    family,
    utc,
)

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

KINDS = {"bool": "bool", "int": "number", "float": "number", "datetime": "datetime", "str": "str", "list": "str"}
TYPES = {
    "bool": np.uint8,
    "int": np.int64,
    "float": np.float64,
    "datetime": np.int64,
    "str": np.int32,
    "list": np.int32,
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TEXTUAL = ("str", "list")


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One field's values of one kind, for n rows. A field with values of two kinds has two columns.

    `values` are numbers, or codes into `table` for text; a list's codes of row r are `values[ends[r-1]:ends[r]]`.
    """

    name: str
    kind: str
    values: Array  # (n,), for a list (its codes,)
    present: Mask  # (n,)
    table: Sequence[str] = ()
    ends: Array | None = None  # int64 (n,), of a list

    def at(self, row: int) -> Any:
        """The value of a row that has one."""
        if self.kind == "list":
            assert self.ends is not None
            first = int(self.ends[row - 1]) if row else 0
            return [self.table[c] for c in self.values[first : int(self.ends[row])]]
        value = self.values[row].item()
        if self.kind == "str":
            return self.table[value]
        if self.kind == "datetime":
            return moment(value)
        return bool(value) if self.kind == "bool" else value


def moment(micros: int) -> datetime:
    """A moment from microseconds since 1970, exactly."""
    return datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)


def micros_of(value: datetime) -> int:
    """Microseconds since 1970, exactly."""
    past = utc(value) - EPOCH
    return (past.days * 86_400 + past.seconds) * 1_000_000 + past.microseconds


def kind_of(field: str, value: object) -> str:
    """The kind of column that holds a value.

    Raises:
        StoreError: it is none of str, int, float, bool, datetime and a list of str.
    """
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise StoreError(f"metadata {field!r} is {value}, which does not fit in 64 bits", hint="keep it as text")
    if isinstance(value, float) and math.isnan(value):
        raise StoreError(f"metadata {field!r} is NaN, which equals nothing", hint="leave the field out")
    for kind, types in (("bool", bool), ("int", int), ("float", float), ("str", str), ("datetime", datetime)):
        if isinstance(value, types):
            return kind
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return "list"
    raise StoreError(
        f"metadata {field!r} is a {type(value).__name__}: str, int, float, bool, datetime and lists of str can be kept"
    )


def encode(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of some rows, in the order in which their fields first appear."""
    found: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for r, row in enumerate(rows):
        for field, value in row.items():
            found.setdefault((field, kind_of(field, value)), []).append((r, value))
    return [_column(name, kind, cells, len(rows)) for (name, kind), cells in found.items()]


def _column(name: str, kind: str, cells: list[tuple[int, Any]], n: int) -> Column:
    present = np.zeros(n, bool)
    present[[r for r, _ in cells]] = True
    codes: dict[str, int] = {}
    if kind == "list":
        lengths = np.zeros(n, np.int64)
        lengths[[r for r, _ in cells]] = [len(v) for _, v in cells]
        flat = [codes.setdefault(s, len(codes)) for _, v in cells for s in v]
        return Column(name, kind, np.array(flat, np.int32), present, list(codes), np.cumsum(lengths))
    values = np.zeros(n, TYPES[kind])
    if kind == "str":
        values[:] = -1
        cells = [(r, codes.setdefault(v, len(codes))) for r, v in cells]
    elif kind == "datetime":
        cells = [(r, micros_of(v)) for r, v in cells]
    values[[r for r, _ in cells]] = [v for _, v in cells]
    return Column(name, kind, values, present, list(codes))


def merge(parts: Sequence[tuple[Sequence[Column], Array]]) -> list[Column]:
    """The columns of chosen rows of several segments, one after the other, without a Python object a row."""
    names = dict.fromkeys((c.name, c.kind) for columns, _ in parts for c in columns)
    return [_merged(name, kind, parts) for name, kind in names]


def _merged(name: str, kind: str, parts: Sequence[tuple[Sequence[Column], Array]]) -> Column:
    codes: dict[str, int] = {}
    values, present, lengths = [], [], []
    for columns, rows in parts:
        column = next((c for c in columns if (c.name, c.kind) == (name, kind)), None)
        if column is None:
            fill = -1 if kind == "str" else 0
            values.append(np.full(0 if kind == "list" else len(rows), fill, TYPES[kind]))
            present.append(np.zeros(len(rows), bool))
            lengths.append(np.zeros(len(rows), np.int64))
            continue
        present.append(column.present[rows])
        if kind == "list":
            taken, counts = _taken(column, rows)
            lengths.append(counts)
        else:
            taken = column.values[rows]
        if kind in TEXTUAL:
            used = np.unique(taken[taken >= 0])
            to = np.full(len(column.table) + 1, -1, np.int32)  # the last one answers for -1
            to[used] = [codes.setdefault(column.table[int(c)], len(codes)) for c in used]
            taken = to[taken]
        values.append(taken)
    ends = np.cumsum(np.concatenate(lengths)) if kind == "list" else None
    return Column(name, kind, np.concatenate(values), np.concatenate(present), list(codes), ends)


def _taken(column: Column, rows: Array) -> tuple[Array, Array]:
    assert column.ends is not None
    starts = np.concatenate([[0], column.ends[:-1]])[rows]
    counts = column.ends[rows] - starts
    first = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return column.values[first + np.arange(counts.sum())], counts


def row_of(columns: Iterable[Column], row: int) -> dict[str, Any]:
    """The fields that a row has."""
    return {c.name: c.at(row) for c in columns if c.present[row]}


def check_fields(where: FilterExpr, known: Iterable[str]) -> None:
    """Refuses a filter on a field that no chunk has, since it is far more often mistyped than meant.

    Raises:
        FilterInvalid: with the nearest field.
    """
    known = set(known)
    for test in conditions(where):
        if test.field not in known and test.op not in (*ABSENT_MATCHES, "$exists"):
            raise FilterInvalid(f"no chunk has a field {test.field!r}.{did_you_mean(test.field, known)}")


def mask(where: FilterExpr, columns: Mapping[str, Sequence[Column]], n: int) -> Mask:
    """Which of n rows pass; `columns` are by field."""
    if isinstance(where, Combination):
        masks = [mask(part, columns, n) for part in where.parts]
        if where.op == "$not":
            return ~masks[0]
        out = masks[0] if masks else np.full(n, where.op == "$and")
        for other in masks[1:]:
            out = out & other if where.op == "$and" else out | other
        return out
    mine = columns.get(where.field, ())
    if where.op == "$exists":
        has = np.zeros(n, bool)
        for column in mine:
            has |= column.present
        return has if where.value else ~has
    turned = where.op in ABSENT_MATCHES
    test = Condition(where.field, {"$ne": "$eq", "$nin": "$in"}.get(where.op, where.op), where.value)
    passed = np.zeros(n, bool)
    for column in mine:
        passed |= _tested(column, test)
    return ~passed if turned else passed


def _tested(column: Column, test: Condition) -> Mask:
    operands = test.value if test.op == "$in" else (test.value,)
    operands = [v for v in operands if family(v) == KINDS[column.kind]]
    if not operands or (column.kind == "list" and test.op in COMPARE):
        return np.zeros(len(column.present), bool)
    if column.kind in TEXTUAL:
        return _text_tested(column, test.op, operands)
    if column.kind == "datetime":
        operands = [micros_of(v) for v in operands]
    if test.op in COMPARE:
        passed = np.asarray(COMPARE[test.op](column.values, operands[0]), bool)
    else:
        passed = np.zeros(len(column.values), bool)
        for operand in operands:
            passed |= column.values == operand
    return passed & column.present


def _text_tested(column: Column, op: str, operands: Sequence[str]) -> Mask:
    if op in COMPARE:
        good = [COMPARE[op](s, operands[0]) for s in column.table]
    else:
        wanted = set(operands)
        good = [s in wanted for s in column.table]
    passed = np.array([*good, False], bool)[column.values]  # code -1, absent, meets the False
    if column.kind == "str":
        return passed
    assert column.ends is not None
    counted = np.concatenate([[0], np.cumsum(passed)])
    before = np.concatenate([[0], column.ends[:-1]])
    return np.asarray(counted[column.ends] > counted[before])
