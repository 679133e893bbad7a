"""Every Python fence of README and docs compiles, and runs unless it is marked as not to be run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(<!-- no-run -->\n+)?```python\n(.*?)```", re.DOTALL)
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCES = [
    pytest.param(text, bool(skip), id=f"{path.relative_to(ROOT)}-{i}")
    for path in FILES
    for i, (skip, text) in enumerate(FENCE.findall(path.read_text()))
]


@pytest.mark.parametrize(("text", "compile_only"), FENCES)
def test_fence(text: str, compile_only: bool, tmp_path: Path) -> None:
    compile(text, "fence", "exec")
    if not compile_only:
        file = tmp_path / "fence.py"
        file.write_text(text)
        done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    dead = []
    for path in FILES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target and not (path.parent / target).exists():
                dead.append(f"{path.relative_to(ROOT)}: {target}")
    assert not dead


def test_the_command_lines_help_is_quick_to_find() -> None:
    for args in (
        [],
        ["run"],
        ["worker"],
        ["runs"],
        ["runs", "resume"],
        ["models"],
        ["models", "pull"],
        ["serve"],
        ["doctor"],
    ):
        argv = [sys.executable, "-m", "agentmesh.cli.main", *args, "--help"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0
        assert "Usage:" in done.stdout
