"""The command line before anything runs: the version, and the error for a missing extra."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from agentmesh import __version__
from agentmesh.cli.main import app
from agentmesh.hub.cache import build_model_folder

WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {gone!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["agentmesh", *sys.argv[1:]]
from agentmesh.cli.main import main
main()
"""
RAG = ("numpy", "faiss", "tantivy", "wordllama", "pypdf", "trafilatura", "torch", "transformers")
CREW = "from agentmesh import Agent, Crew\nclass A(Agent):\n    'a'\n    model = 'openai:x'\ncrew = Crew(A())\n"
READER = "from agentmesh_agents import Librarian\n" + CREW


def agentmesh(*args: str, cwd: Path, gone: Sequence[str] = ()) -> tuple[int, str, str]:
    """The command's code, output and error output, where these packages are not installed."""
    argv = [sys.executable, "-c", WITHOUT.format(gone=set(gone)), *args]
    env = {**os.environ, "OPENAI_API_KEY": "x"}
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_version_needs_no_command(tmp_path: Path) -> None:
    assert agentmesh("--version", cwd=tmp_path) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "args",
    [
        ("rag", "add", "."),
        ("rag", "search", "tea"),
        ("rag", "stats"),
        ("rag", "verify"),
        ("run", "reader.py", "tea"),
        ("run", "agentmesh.rag.ingest", "{}"),
        ("worker", "agentmesh.rag.ingest"),
        ("serve", "crew.py", "--embed", "wordllama"),
    ],
    ids=" ".join,
)
def test_without_the_extra_rag_each_door_says_what_to_install(args: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "crew.py").write_text(CREW)
    (tmp_path / "reader.py").write_text(READER)
    code, out, err = agentmesh(*args, cwd=tmp_path, gone=RAG)
    assert (code, out) == (4, ""), err
    assert "pip install 'agentmesh-celery[rag]'" in err
    assert "Traceback" not in err


def test_a_model_that_is_here_is_pulled_without_a_word_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMESH_CACHE", str(tmp_path))
    with build_model_folder("org/tiny", "here") as folder:
        (folder / "config.json").write_text("{}")
    said = (0, f"org/tiny: {tmp_path / 'models' / 'org--tiny'}\n", "")
    assert agentmesh("models", "pull", "org/tiny", cwd=tmp_path) == said


def test_ctrl_c_before_anything_has_begun_ends_the_command_whoever_swallows_exceptions(tmp_path: Path) -> None:
    """As the callback of a weak reference does in the middle of an import, which then holds its lock for ever."""
    (tmp_path / "crew.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    assert agentmesh("run", "crew.py", "x", cwd=tmp_path) == (130, "", "")


def every_command() -> Iterator[tuple[str, Any]]:
    """Each command with its words, the groups among them."""
    waiting: list[tuple[str, Any]] = [("agentmesh", typer.main.get_command(app))]
    while waiting:
        words, command = waiting.pop()
        yield words, command
        waiting += [(f"{words} {name}", sub) for name, sub in getattr(command, "commands", {}).items()]


def test_the_help_of_each_command_ends_with_an_example() -> None:
    commands = dict(every_command())
    assert {"agentmesh run", "agentmesh runs resolve", "agentmesh models pull"} <= set(commands)
    without = [words for words, command in commands.items() if f"  {words}" not in f"{command.epilog or ''} "]
    assert [words for words in without if not words.startswith("agentmesh rag")] == []


@pytest.mark.parametrize(
    ("outcome", "value", "told"),
    [
        ("done", "tea", "error: --value 'tea' is not JSON ("),
        ("maybe", "null", "error: unknown outcome 'maybe'\nhelp: use one of: done, failed, retry\n"),
    ],
)
def test_an_outcome_that_cannot_be_is_refused_before_a_journal_is_opened(
    outcome: str, value: str, told: str, tmp_path: Path
) -> None:
    code, out, err = agentmesh("runs", "resolve", "r", "1", outcome, "--value", value, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(told)
    assert not list(tmp_path.iterdir())
