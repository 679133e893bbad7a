"""The examples of the documentation, run with the bundled model."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmesh.hub.cache import is_installed

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture
def answered(tmp_path: Path) -> Callable[..., str]:
    """`answered("briefing.py", "What?", texts, BRIEFING_FOLDER="notes")`: what an example says to files in that folder."""
    if not is_installed("smollm2"):
        if os.environ.get("CI"):
            pytest.fail("smollm2 is not in the cache: agentmesh models pull smollm2")
        pytest.skip("smollm2 is not in the cache: agentmesh models pull smollm2")

    def run(example: str, question: str, texts: dict[str, str], **folder: str) -> str:
        ((variable, name),) = folder.items()
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file).write_text(text)
        env = {**os.environ, variable: str(tmp_path / name)}
        argv = [sys.executable, "-m", "agentmesh.cli.main", "run", str(EXAMPLES / example), question]
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
