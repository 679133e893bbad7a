"""Files that the docs name are there under that name."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATH = re.compile(r"`((?:[\w.]+/)+[\w.]+\.(?:py|lua|md|toml))`")
ROOTS = ["", "agentmesh", "agents", "tools", "docs", "docs/examples/plugins"]


def test_files_that_the_docs_name_are_there() -> None:
    gone = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in PAGES
        for path in PATH.findall(page.read_text())
        if not any((ROOT / root / path).exists() for root in ROOTS)
    ]
    assert not gone
