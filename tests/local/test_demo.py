"""`agentmesh run docs/examples/briefing.py` with the bundled model: a real worker, a real Valkey, real SmolLM2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentmesh.models.cache import is_installed

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "briefing.py"
TEXTS = {
    "tea.md": "The committee met in May and decided to buy green tea. It costs ten euros a tin.",
    "coffee.md": "Coffee was rejected because it keeps everybody awake. The vote was three to one.",
}


def test_the_demo_reads_every_file_with_the_bundled_model(tmp_path: Path) -> None:
    if not is_installed("smollm2"):
        if os.environ.get("CI"):
            pytest.fail("smollm2 is not in the cache: agentmesh models pull smollm2")
        pytest.skip("smollm2 is not in the cache: agentmesh models pull smollm2")
    notes = tmp_path / "notes"
    notes.mkdir()
    for name, text in TEXTS.items():
        (notes / name).write_text(text)
    env = {**os.environ, "BRIEFING_FOLDER": str(notes)}
    argv = [sys.executable, "-m", "agentmesh.cli.main", "run", str(EXAMPLE), "What was decided?"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    for name in TEXTS:
        note = re.search(rf"^- \*\*{name}\*\*: (.+)$", done.stdout, re.MULTILINE)
        assert note is not None
        assert note.group(1).strip()
    assert "## Sources\n\n1. coffee.md\n2. tea.md" in done.stdout
