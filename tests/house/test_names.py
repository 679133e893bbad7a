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

# Functions that implement one protocol: a program's entry point, PEP 562, a document loader by its file format.
PROTOCOLS = {"main", "__getattr__", "read"}

# What stands twice today, with its files. A name leaves these lists when one of the two gets a name of its own.
CLASSES_NAMED_TWICE = {
    "Answer": ["agentmesh/model.py", "agents/agentmesh_agents/librarian.py"],
    "Engine": ["agentmesh/engine/engine.py", "agentmesh/inference/engine.py"],
    "Fault": ["agentmesh/testing/chaos.py", "agentmesh/testing/fake_openai.py"],
    "Piece": [
        "agentmesh/inference/tokenization.py", "tools/agentmesh_tools/files.py", "tools/agentmesh_tools/sentences.py",
    ],
    "Request": ["agentmesh/inference/request.py", "agentmesh/testing/fake_openai.py"],
    "Server": ["agentmesh/runtime/valkey_watchdog.py", "agentmesh/testing/chaos.py"],
    "_Connection": ["agentmesh/celery/dispatch.py", "agentmesh/testing/fake_openai.py"],
    "_Process": ["agentmesh/celery/prefork.py", "agentmesh/testing/servers.py"],
    "_Server": [
        "agentmesh/models/load_balancer.py", "agentmesh/serve/server.py", "agentmesh/worker/health_server.py",
    ],
}  # fmt: skip
EVENTS_NAMED_TWICE = {"RunCancelled": ["agentmesh/errors.py"], "RunFailed": ["agentmesh/errors.py"]}
FUNCTIONS_NAMED_TWICE = {
    "answer_of": ["agentmesh/langchain/chat.py", "agentmesh/models/openai_format.py"],
    "error_text": ["agentmesh/models/openai_format.py", "agentmesh/testing/fake_openai.py"],
    "first_line": ["agentmesh/inference/kernels.py", "agents/agentmesh_agents/reader.py"],
    "load": ["agentmesh/config.py", "agentmesh/inference/loader.py", "agentmesh/rag/loaders/__init__.py"],
    "pieces": ["agents/agentmesh_agents/reader.py", "tools/agentmesh_tools/sentences.py"],
    "run": ["agentmesh/cli/main.py", "agentmesh/runtime/local.py"],
    "start": ["agentmesh/journal/protocol.py", "agentmesh/runtime/local.py"],
    "without_password": ["agentmesh/celery/app.py", "agentmesh/hub/download.py"],
}


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


def event_names() -> set[str]:
    """The classes of journal/events.py that are events."""
    tree = ast.parse((ROOT / "agentmesh" / "journal" / "events.py").read_text())
    return {n.name for n in tree.body if isinstance(n, ast.ClassDef)}


def test_no_two_classes_have_one_name() -> None:
    twice = named_twice(definitions(ast.ClassDef))
    assert {name: files for name, files in twice.items() if name not in event_names()} == CLASSES_NAMED_TWICE


def test_no_class_has_the_name_of_an_event() -> None:
    events = "agentmesh/journal/events.py"
    twice = named_twice(definitions(ast.ClassDef))
    shared = {name: [f for f in files if f != events] for name, files in twice.items() if name in event_names()}
    assert shared == EVENTS_NAMED_TWICE


def test_no_two_public_functions_have_one_name() -> None:
    twice = named_twice(definitions(ast.FunctionDef, ast.AsyncFunctionDef))
    public = {name: files for name, files in twice.items() if not name.startswith("_") and name not in PROTOCOLS}
    assert public == FUNCTIONS_NAMED_TWICE


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
