"""`agentmesh run docs/examples/ask_docs.py` with the bundled model: whatever it says, the quotes stand in the documents."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentmesh.models.cache import is_installed

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "ask_docs.py"
TEXTS = {
    "tea.md": "# Tea\n\nThe committee met in May and decided to buy green tea.\nIt costs ten euros a tin.\n",
    "coffee.md": "# Coffee\n\nCoffee was rejected because it keeps everybody awake.\n",
}
QUOTE = re.compile(r"^\[\d+\] “(.+)”\n    docs/(\S+):(\d+)$", re.MULTILINE)


def test_a_question_to_a_folder_is_answered_with_quotes_that_stand(tmp_path: Path) -> None:
    if not is_installed("smollm2"):
        if os.environ.get("CI"):
            pytest.fail("smollm2 is not in the cache: agentmesh models pull smollm2")
        pytest.skip("smollm2 is not in the cache: agentmesh models pull smollm2")
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in TEXTS.items():
        (docs / name).write_text(text)
    env = {**os.environ, "ASK_DOCS_FOLDER": str(docs)}
    argv = [sys.executable, "-m", "agentmesh.cli.main", "run", str(EXAMPLE), "What did the committee decide?"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    quotes = QUOTE.findall(done.stdout)
    assert quotes, done.stdout
    for words, name, start in quotes:
        assert TEXTS[name][int(start) :].startswith(words)
    assert any("decided to buy green tea" in words for words, _, _ in quotes)
