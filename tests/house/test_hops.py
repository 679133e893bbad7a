"""A reader reaches each topic through as many files as docs/architecture.md says, and each file names the next."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "docs/architecture.md").read_text().partition("## Where things are")[2].partition("\n\n**")[0]
ROWS = dict(re.findall(r"^\| (a .*?) \| (.*) \|$", TABLE, re.MULTILINE))
# Entries of earlier versions do not say their lane, nor that they are limited.
OF_EARLIER_VERSIONS = {
    "agentmesh/journal/lua/common.lua: return r.kind == 'Sleep' and 'due' or r.kind == 'Approve' and 'held' "
    "or r.kind == 'Delegate' and 'child' or 'queued'",
    "agentmesh/journal/lua/claim.lua: if r.limited == 1 or (r.kind == 'Ask' and not r.lane) then -- of earlier versions, an Ask",
}
PLACE = re.compile(r"`([\w/]+\.(?:py|lua))`(?: `(\w+)`)?")
MOST = {
    "a step's result is committed": 2,
    "a message is sent": 2,
    "a lease is renewed": 1,
    "a step is retried": 1,
    "a run is retried": 1,
    "a tool is called": 1,
    "a provider of models is added": 1,
    "a kind of step is added": 1,
    "a command is added": 1,
}


def hops(row: str) -> list[list[tuple[str, str]]]:
    """The files one after the other, each with its twins: (file, name) pairs."""
    return [PLACE.findall(hop) for hop in ROWS[row].split(" → ")]


def names_in(path: str) -> set[str]:
    text = (ROOT / path).read_text()
    if path.endswith(".lua"):
        return set(re.findall(r"^local function (\w+)", text, re.MULTILINE))
    defines = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, defines)}


def test_the_table_has_what_a_stranger_looks_for() -> None:
    assert ROWS.keys() == MOST.keys()


@pytest.mark.parametrize("row", MOST)
def test_it_is_where_the_table_says(row: str) -> None:
    assert len(hops(row)) <= MOST[row]
    for hop in hops(row):
        assert hop, ROWS[row]
        for path, name in hop:
            assert (ROOT / path).is_file(), path
            assert not name or name in names_in(path), f"{path} has no {name}"


@pytest.mark.parametrize("row", [row for row, most in MOST.items() if most > 1])
def test_both_ends_of_a_hop_name_each_other(row: str) -> None:
    (first, _), *_ = hops(row)[0]
    for path, _ in hops(row)[1]:
        short = path.removeprefix("agentmesh/")
        if path != "agentmesh/journal/protocol.py":
            assert short in (ROOT / first).read_text(), f"{first} does not name {short}"
            assert first.removeprefix("agentmesh/") in (ROOT / path).read_text(), f"{path} does not name {first}"
    lua, twin = "agentmesh/journal/lua/commit.lua", "agentmesh/journal/protocol.py"
    assert "lua/commit.lua" in (ROOT / twin).read_text()
    assert "journal/protocol.py" in (ROOT / lua).read_text()


def test_nothing_asks_which_class_or_kind_a_step_is() -> None:
    """A new kind would have to be added there too; tests/unit/test_new_step_kind.py shows that it need not be."""
    kinds = "Ask|Call|Delegate|Approve|Sleep"
    asks = re.compile(
        rf"isinstance\([^()]*\b({kinds})\b[^()]*\)|\bkind (==|!=|in) .?.?({kinds})\b|\bkind [=~]= '({kinds})'"
    )
    found = {}
    for folder in ("engine", "journal", "celery", "worker", "cli", "observability", "definitions"):
        for path in sorted((ROOT / "agentmesh" / folder).rglob("*.*")):
            if path.suffix in (".py", ".lua"):
                for line in path.read_text().splitlines():
                    if asks.search(line):
                        found[f"{path.relative_to(ROOT)}: {line.strip()}"] = 1
    assert set(found) <= OF_EARLIER_VERSIONS
