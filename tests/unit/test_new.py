"""`agentmesh new`: what it makes passes its own test at once, is clean, and nothing that is there is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentmesh.cli.new import make_new
from agentmesh.errors import DefinitionError

FILES = ["README.md", "crew.py", "test_crew.py"]


def python(*args: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", *args], cwd=cwd, capture_output=True, text=True, timeout=100)


def new(name: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return python("agentmesh.cli.main", "new", name, cwd=cwd)


def test_what_it_makes_passes_its_test_and_is_clean(tmp_path: Path) -> None:
    done = new("shop", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "cd shop && python -m pytest",
        "agentmesh models pull smollm2",
        'agentmesh run crew.py "What does tea cost?"',
    ]
    shop = tmp_path / "shop"
    assert sorted(os.listdir(shop)) == FILES
    tested = python("pytest", "-q", "-p", "no:cacheprovider", cwd=shop)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "2 passed" in tested.stdout
    for tool in (["check", "--select", "E,F,I,B,UP,SIM,PL,RUF,PT"], ["format", "--check"]):
        linted = python("ruff", *tool, "--isolated", "--line-length", "120", ".", cwd=shop)
        assert linted.returncode == 0, linted.stdout + linted.stderr
    assert len((shop / "README.md").read_text().splitlines()) == 5
    assert (shop / "README.md").read_text().startswith("# shop\n")


def test_an_empty_folder_is_filled_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert new("empty", tmp_path).returncode == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "full", "file", "link"):
        done = new(name, tmp_path)
        assert done.returncode == 2
        assert done.stderr == f"error: {name!r} already exists and is not an empty folder\nhelp: choose another name\n"
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "/tmp/x", "a\\b", "a\nb", "x" * 256, "it's"])
def test_a_name_that_is_no_folder_s_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DefinitionError, match=r"is not a valid folder name; use a name such as 'shop'") as refused:
        make_new(name)
    assert repr(name) in refused.value.message
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs a folder that nobody may write in: /proc")
def test_a_place_that_cannot_be_written_is_told() -> None:
    done = new("shop", Path("/proc"))
    assert done.returncode == 4
    assert done.stderr.startswith("error: 'shop' cannot be made: ")
    assert "Traceback" not in done.stderr
