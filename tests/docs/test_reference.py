"""Every public name has its place in the Python API, every place its name, and the site builds without a warning."""

import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FACES = [
    "agentmesh",
    "agentmesh.testing",
    "agentmesh.testing.contracts",
    "agentmesh.langchain",
    "agentmesh.rag.store",
    "agentmesh_agents",
    "agentmesh_tools",
]
LISTED = [
    name
    for page in sorted((DOCS / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_is_listed_once(face: str) -> None:
    public = {f"{face}.{name}" for name in importlib.import_module(face).__all__}
    counts = Counter(LISTED)
    assert {name: counts[name] for name in public if counts[name] != 1} == {}


def test_every_listed_name_is_public() -> None:
    public = {f"{face}.{name}" for face in FACES for name in importlib.import_module(face).__all__}
    assert set(LISTED) - public == set()


def test_every_page_is_in_the_navigation_and_in_llms_txt() -> None:
    navigation = (DOCS / "site" / "mkdocs.yml").read_text()
    index = (DOCS / "llms.txt").read_text()
    pages = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} - {"changelog.md"}
    top = {p for p in pages if not p.startswith("decisions/0")}
    assert {p for p in top if f" {p}\n" not in navigation} == set()
    assert {p for p in top - {"decisions/README.md"} if f"]({p})" not in index} == set()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::UserWarning:mkdocs", "-m", "mkdocs", "build", "--quiet", "--strict"]
    built = subprocess.run(
        [*command, "--config-file", "docs/site/mkdocs.yml", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "reference" / "runs.html").read_text()
    assert 'id="agentmesh.Run.result"' in page  # from the docstring of a method
    assert "fonts.googleapis.com" not in page
