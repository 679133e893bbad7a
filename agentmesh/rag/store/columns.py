"""Metadata by column: encoded for a segment's file, read back by row, and tested against a filter for all rows at once."""

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
    """The values of one kind that a field has in n rows. A field with values of two kinds has two columns.

    `values` are numbers, or for text codes into `table` (dictionary encoding); a list's codes in row r are
    `values[ends[r-1]:ends[r]]`.
    """

    name: str
    kind: str
    values: Array  # (n,); for a list (the number of all its codes,)
    present: Mask  # (n,)
    table: Sequence[str] = ()
    ends: Array | None = None  # int64 (n,), for a list

    def at(self, row: int) -> Any:
        """The value in a row that has one."""
        if self.kind == "list":
            assert self.ends is not None
            first = int(self.ends[row - 1]) if row else 0
            return [self.table[c] for c in self.values[first : int(self.ends[row])]]
        value = self.values[row].item()
        if self.kind == "str":
            return self.table[value]
        if self.kind == "datetime":
            return datetime_of(value)
        return bool(value) if self.kind == "bool" else value


def datetime_of(micros: int) -> datetime:
    """A datetime from microseconds since 1970, without rounding."""
    return datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)


def micros_of(value: datetime) -> int:
    """Microseconds since 1970, without rounding."""
    elapsed = utc(value) - EPOCH
    return (elapsed.days * 86_400 + elapsed.seconds) * 1_000_000 + elapsed.microseconds


def kind_of(field: str, value: object) -> str:
    """The kind of column that holds a value.

    Raises:
        StoreError: it is not a str, int of 64 bits, float, bool, datetime or list of str.
    """
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise StoreError(f"metadata {field!r} is {value}, which does not fit in 64 bits", hint="store it as a str")
    if isinstance(value, float) and math.isnan(value):
        raise StoreError(f"metadata {field!r} is NaN, which no filter can match", hint="leave the field out")
    for kind, types in (("bool", bool), ("int", int), ("float", float), ("str", str), ("datetime", datetime)):
        if isinstance(value, types):
            return kind
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return "list"
    raise StoreError(
        f"metadata {field!r} is a {type(value).__name__}, which a store cannot hold",
        hint="use a str, int, float, bool, datetime or list of str",
    )


def encode(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of some rows, in the order in which their fields first appear."""
    cells_of: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for r, row in enumerate(rows):
        for field, value in row.items():
            cells_of.setdefault((field, kind_of(field, value)), []).append((r, value))
    return [_encode_column(name, kind, cells, len(rows)) for (name, kind), cells in cells_of.items()]


def _encode_column(name: str, kind: str, cells: list[tuple[int, Any]], n: int) -> Column:
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


def merge_columns(parts: Sequence[tuple[Sequence[Column], Array]]) -> list[Column]:
    """The columns of some rows of several segments, one after the other, without a Python object for each row.

    Args:
        parts: the columns of a segment, and int64 (n,) the rows of it.
    """
    names = dict.fromkeys((c.name, c.kind) for columns, _ in parts for c in columns)
    return [_merge_column(name, kind, parts) for name, kind in names]


def _merge_column(name: str, kind: str, parts: Sequence[tuple[Sequence[Column], Array]]) -> Column:
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
            selected, counts = _select_lists(column, rows)
            lengths.append(counts)
        else:
            selected = column.values[rows]
        if kind in TEXTUAL:
            used = np.unique(selected[selected >= 0])
            recode = np.full(len(column.table) + 1, -1, np.int32)  # old code -> new code; the last one maps -1 to -1
            recode[used] = [codes.setdefault(column.table[int(c)], len(codes)) for c in used]
            selected = recode[selected]
        values.append(selected)
    ends = np.cumsum(np.concatenate(lengths)) if kind == "list" else None
    return Column(name, kind, np.concatenate(values), np.concatenate(present), list(codes), ends)


def _select_lists(column: Column, rows: Array) -> tuple[Array, Array]:
    """The codes of these rows' lists one after the other, and the length of each list."""
    assert column.ends is not None
    starts = np.concatenate([[0], column.ends[:-1]])[rows]
    counts = column.ends[rows] - starts
    first = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return column.values[first + np.arange(counts.sum())], counts


def row_of(columns: Iterable[Column], row: int) -> dict[str, Any]:
    """The fields of a row, without those it does not have."""
    return {c.name: c.at(row) for c in columns if c.present[row]}


def check_fields(where: FilterExpr, fields: Iterable[str]) -> None:
    """Refuse a filter on a field that no chunk has: it is far more often mistyped than meant.

    Raises:
        FilterInvalid: with the nearest field name.
    """
    names = set(fields)
    for condition in conditions(where):
        if condition.field not in names and condition.op not in (*ABSENT_MATCHES, "$exists"):
            raise FilterInvalid(f"no chunk has a field {condition.field!r}.{did_you_mean(condition.field, names)}")


def mask(where: FilterExpr, columns: Mapping[str, Sequence[Column]], n: int) -> Mask:
    """Which of n rows pass a filter, bool (n,); `columns` are by field."""
    if isinstance(where, Combination):
        masks = [mask(part, columns, n) for part in where.parts]
        if where.op == "$not":
            return ~masks[0]
        combined = masks[0] if masks else np.full(n, where.op == "$and")
        for other in masks[1:]:
            combined = combined & other if where.op == "$and" else combined | other
        return combined
    field_columns = columns.get(where.field, ())
    if where.op == "$exists":
        exists = np.zeros(n, bool)
        for column in field_columns:
            exists |= column.present
        return exists if where.value else ~exists
    negated = where.op in ABSENT_MATCHES
    condition = Condition(where.field, {"$ne": "$eq", "$nin": "$in"}.get(where.op, where.op), where.value)
    passed = np.zeros(n, bool)
    for column in field_columns:
        passed |= _test_column(column, condition)
    return ~passed if negated else passed


def _test_column(column: Column, condition: Condition) -> Mask:
    operands = condition.value if condition.op == "$in" else (condition.value,)
    operands = [v for v in operands if family(v) == KINDS[column.kind]]
    if not operands or (column.kind == "list" and condition.op in COMPARE):
        return np.zeros(len(column.present), bool)
    if column.kind in TEXTUAL:
        return _test_texts(column, condition.op, operands)
    if column.kind == "datetime":
        operands = [micros_of(v) for v in operands]
    if condition.op in COMPARE:
        passed = np.asarray(COMPARE[condition.op](column.values, operands[0]), bool)
    else:
        passed = np.zeros(len(column.values), bool)
        for operand in operands:
            passed |= column.values == operand
    return passed & column.present


def _test_texts(column: Column, op: str, operands: Sequence[str]) -> Mask:
    if op in COMPARE:
        passing = [COMPARE[op](text, operands[0]) for text in column.table]
    else:
        accepted = set(operands)
        passing = [text in accepted for text in column.table]
    passed = np.array([*passing, False], bool)[column.values]  # code -1, of an absent value, indexes the False
    if column.kind == "str":
        return passed
    assert column.ends is not None
    passed_before = np.concatenate([[0], np.cumsum(passed)])
    starts = np.concatenate([[0], column.ends[:-1]])
    return np.asarray(passed_before[column.ends] > passed_before[starts])
