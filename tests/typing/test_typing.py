"""The types of the public face, as mypy --strict and pyright strict see them.

In `ok_*.py` no line may be an error; those files are also run. In `bad_*.py` each line marked `# error: CODE RULE` must be
an error under both checkers, of mypy's code and pyright's rule, and no other line may be one.
"""

import json
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted([*HERE.glob("ok_*.py"), *HERE.glob("bad_*.py")])
MARK = re.compile(r"# error: (\S+) (\S+)$")
Errors = dict[tuple[str, int], set[str]]  # by file and line: the codes


def marked_errors(group: int) -> Errors:
    errors: Errors = {}
    for path in FILES:
        for n, line in enumerate(path.read_text().splitlines(), 1):
            if mark := MARK.search(line):
                errors[path.name, n] = {mark[group]}
            assert mark or "# error" not in line, f"{path.name}:{n}: a marker names mypy's code and pyright's rule"
    return errors


def mypy_errors() -> Errors:
    argv = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", "--show-error-codes", *map(str, FILES)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors: Errors = defaultdict(set)
    for line in done.stdout.splitlines():
        if ": error: " in line:
            found = re.fullmatch(r"(?:.*/)?([^/:]+):(\d+): error: .*\[(\S+)\]", line)
            assert found, line
            errors[found[1], int(found[2])].add(found[3])
    return errors


def pyright_errors() -> Errors:
    argv = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(HERE)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(FILES), done.stdout
    errors: Errors = defaultdict(set)
    for e in report["generalDiagnostics"]:
        errors[Path(e["file"]).name, e["range"]["start"]["line"] + 1].add(e.get("rule", e["message"]))
    return errors


@pytest.mark.timeout(600)  # the first run of a checker reads all that agentmesh imports
@pytest.mark.parametrize(("checker", "group"), [(mypy_errors, 1), (pyright_errors, 2)], ids=["mypy", "pyright"])
def test_a_checker_finds_what_is_marked_and_nothing_else(checker: Callable[[], Errors], group: int) -> None:
    errors, marked = checker(), marked_errors(group)
    assert len(marked) > 25
    assert sorted(errors) == sorted(marked)
    assert {place: codes for place, codes in marked.items() if not codes <= errors[place]} == {}


@pytest.mark.parametrize("path", [p for p in FILES if p.name.startswith("ok_")], ids=lambda p: p.name)
def test_what_passes_the_checkers_runs(path: Path) -> None:
    runpy.run_path(str(path))
