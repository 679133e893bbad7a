"""The names of the house: one meaning for each class, public function and module; every module named by a known term."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("agentmesh", "agents/agentmesh_agents", "tools/agentmesh_tools")
SOURCES = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))
GLOSSARY = ROOT / "docs" / "glossary.md"

# Functions that implement one protocol: a program's entry point, PEP 562, a document loader by its file format; and
# `run` and `start`, which are plain calls, their twins to await in `agentmesh.aio`, and the command `agentmesh run`.
PROTOCOLS = {"main", "__getattr__", "read", "run", "start"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def definitions(*kinds: type[ast.stmt]) -> Iterator[tuple[str, str]]:
    """(name, file) of each module-level definition of these kinds; overloads of one function count once."""
    for path in SOURCES:
        names = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, kinds)}  # type: ignore[attr-defined]
        yield from ((name, relative(path)) for name in sorted(names))


def named_twice(pairs: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    files = defaultdict(list)
    for name, file in pairs:
        files[name].append(file)
    return {name: found for name, found in sorted(files.items()) if len(found) > 1}


def test_no_two_classes_have_one_name() -> None:
    """Events too: the error that `result()` raises does not share its name with the event that it reports."""
    assert named_twice(definitions(ast.ClassDef)) == {}


def test_no_two_public_functions_have_one_name() -> None:
    twice = named_twice(definitions(ast.FunctionDef, ast.AsyncFunctionDef))
    assert {n: files for n, files in twice.items() if not n.startswith("_") and n not in PROTOCOLS} == {}


def glossary() -> tuple[set[str], set[str]]:
    """The terms of the glossary as module names, and the names in its table of modules."""
    words, heading, table = GLOSSARY.read_text().partition("## Modules\n")
    assert heading
    terms = {
        m[1].lower().replace(" ", "_").replace("-", "_") for m in re.finditer(r"^\| \*\*([^*]+)\*\* \|", words, re.M)
    }
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return terms, {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def modules() -> set[str]:
    """The names of all modules and packages but the one at the top."""
    names = {path.parent.name if path.stem == "__init__" else path.stem for path in SOURCES}
    return names - {"agentmesh"}


def test_each_module_is_named_by_a_term_of_the_glossary() -> None:
    terms, rows = glossary()
    assert {
        name for name in modules() if name not in rows and name not in terms and name.removesuffix("s") not in terms
    } == set()


def test_the_table_of_modules_names_files_that_exist() -> None:
    _, rows = glossary()
    assert rows - modules() == set()
