"""The house itself: floors, circles, sizes, names, weight, what a wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import agentmesh
from agentmesh import errors

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for top in ("agentmesh", "agents", "tools") for p in (ROOT / top).rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 350, 45
HEAVY = (
    "celery",
    "kombu",
    "redis",
    "torch",
    "transformers",
    "faiss",
    "numpy",
    "langchain",
    "langchain_core",
    "aiohttp",
    "rich",
    "typer",
)
LOOKS = """
from agentmesh import ConfigError
from agentmesh.models.registry import ModelRegistry
for name in ("local:smollm2", "openai:gpt-5-mini"):
    try:
        ModelRegistry().check(name)
    except ConfigError:
        pass
"""
# in-function imports keep `agentmesh` light; these rooms may have them
MAY_IMPORT_LATE = ("agentmesh/runtime/local.py", "agentmesh/runtime/bootstrap.py", "agentmesh/runtime/optional.py",
                   "agentmesh/cli/main.py", "agentmesh/cli/models.py", "agentmesh/cli/rag.py", "agentmesh/hub/pull.py",
                   "agentmesh/hub/download.py", "agentmesh/models/registry.py",
                   "agentmesh/definitions/tool.py")  # fmt: skip


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("agents", "tools") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Everything a reader must hold in the head: type-only and in-function imports too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {name for name in found if name.split(".")[0].startswith("agentmesh")}


def test_there_is_no_circle_in_the_head() -> None:
    modules = {module_of(p): p for p in SOURCES}
    # the face names everything, and boot brings it up late: both are doors, not rooms
    edges = {m: {i for i in imports_of(p) if i in modules and i not in (m, "agentmesh")} for m, p in modules.items()}
    seen: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if seen.get(module) == 2:
            return
        assert seen.get(module) != 1, " -> ".join((*path[path.index(module) :], module))
        seen[module] = 1
        for other in sorted(edges[module]):
            visit(other, (*path, module))
        seen[module] = 2

    for module in sorted(modules):
        visit(module, ())


def test_files_and_functions_are_short() -> None:
    long = [
        f"{p.relative_to(ROOT)}: {n} lines" for p in SOURCES if (n := len(p.read_text().splitlines())) > LONGEST_FILE
    ]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long


def test_imports_stand_at_the_top() -> None:
    late = []
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name not in MAY_IMPORT_LATE:
                late += [f"{name}: {node.name}" for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not late


def test_the_face_is_sorted_and_whole() -> None:
    assert agentmesh.__all__ == sorted(agentmesh.__all__)
    for name in agentmesh.__all__:
        assert getattr(agentmesh, name) is not None
    missing = {c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)} - set(
        agentmesh.__all__
    )
    assert not missing


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from agentmesh import Agent, Crew, run, tool", HEAVY),
        ("import agentmesh", (*HEAVY, "pydantic")),
        (LOOKS, HEAVY),
        (
            "from agentmesh.cli.main import main; sys.argv[1:] = ['--help']; main()",
            (*(m for m in HEAVY if m != "typer"), "pydantic"),
        ),
    ],
)
def test_what_is_not_needed_is_not_loaded(code: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, atexit; atexit.register(lambda: print([m for m in {heavy!r} if m in sys.modules]))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_module_bears_a_name_of_the_face() -> None:
    modules = {path.stem for path in (ROOT / "agentmesh").iterdir()}
    assert modules & set(agentmesh.__all__) == {"aio"}  # the one module that is itself on the face


def test_public_things_have_docstrings() -> None:
    bare = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            bare.append(str(path.relative_to(ROOT)))
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
                "_"
            ):
                overloads = any("overload" in ast.unparse(d) for d in node.decorator_list)
                if not ast.get_docstring(node) and not overloads:
                    bare.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not bare


def test_nothing_of_a_machine_is_in_the_project() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = ["/" + "work/", "/" + "root/", "/" + "home/"]
    found = []
    for name in listed:
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".lua", ".ipynb", ".txt", ""):
            text = path.read_text(errors="replace")
            found += [f"{name}: {word}" for word in words if word in text]
    assert not found


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    known = [c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert not [name for name in known if f"### {name}" not in text]


def test_the_wheel_holds_three_packages_and_their_files(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"agentmesh", "agentmesh_agents", "agentmesh_tools"}
    for verb in (
        "common",
        "begin",
        "claim",
        "renew",
        "release",
        "commit",
        "hold",
        "plan",
        "signal",
        "notified",
        "sweep",
    ):
        assert f"agentmesh/journal/lua/{verb}.lua" in names
    assert "agentmesh/py.typed" in names


def test_what_to_do_stands_in_the_hint_of_an_error() -> None:
    """No sentence of an error holds both: commands print `message` and `hint` as two lines."""
    classes = {c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MeshError)}
    both = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in classes and node.args:
                texts = [n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)]
                both += [
                    f"{path.relative_to(ROOT)}:{node.lineno}" for text in texts if "; " in str(text) and text != "; "
                ]
    assert not both


def test_commands_and_the_endpoint_use_the_public_face() -> None:
    """No private attribute of an object that is not their own; of the engine, what a handle to a run is made of."""
    engine = {"agentmesh.engine.run", "agentmesh.engine.async_run", "agentmesh.engine.run_errors"}
    behind = []
    for path in [p for p in SOURCES if p.parts[-2] in ("cli", "serve")]:
        name = str(path.relative_to(ROOT))
        inner = [i for i in imports_of(path) if i.startswith("agentmesh.engine.") and i.count(".") == 2]
        behind += [f"{name}: imports {i}" for i in inner if i not in engine]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                behind.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not behind
