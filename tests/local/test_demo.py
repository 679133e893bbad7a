"""`agentmesh run docs/examples/briefing.py` with the bundled model: a real worker, a real Valkey, real SmolLM2."""

import re
from typing import Any

TEXTS = {
    "tea.md": "The committee met in May and decided to buy green tea. It costs ten euros a tin.",
    "coffee.md": "Coffee was rejected because it keeps everybody awake. The vote was three to one.",
}


def test_the_demo_reads_every_file_with_the_bundled_model(answered: Any) -> None:
    out = answered("briefing.py", "What was decided?", TEXTS, BRIEFING_FOLDER="notes")
    for name in TEXTS:
        note = re.search(rf"^- \*\*{name}\*\*: (.+)$", out, re.MULTILINE)
        assert note is not None
        assert note.group(1).strip()
    assert "## Sources\n\n1. coffee.md\n2. tea.md" in out
