"""docs/config.md lists every setting with the default it has, and every variable that agentmesh reads."""

import re
from pathlib import Path

from agentmesh.config import Config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "config.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (.*?) \| (.*?) \| ", re.MULTILINE)
BETWEEN_OUR_PROCESSES = {"AGENTMESH_WORKER_SPEC", "AGENTMESH_REPORTS_IN"}
READ = re.compile(r"(?:environ(?:\.get)?[(\[]|^\w+_IN = )\"([A-Z_]+)\"", re.MULTILINE)
THE_PLATFORMS = {"LOCALAPPDATA", "XDG_CACHE_HOME", "PIP_CERT", "PROMETHEUS_MULTIPROC_DIR"}


def test_each_setting_is_listed_with_its_variable_its_default_and_its_bound() -> None:
    listed = {name: (variable, default, bound) for name, variable, default, bound in ROW.findall(PAGE)}
    assert listed == {
        name: (f"AGENTMESH_{name.upper()}", _shown(field.default), _bound(field.metadata))
        for name, field in Config.model_fields.items()
    }


def _shown(default: object) -> str:
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`" if str(default) else "empty"


def _bound(metadata: list[object]) -> str:
    for given in metadata:
        for sign, word in (("ge", "at least"), ("gt", "above")):
            if hasattr(given, sign):
                return f"{word} {getattr(given, sign):g}"
    return "any"


def test_every_variable_that_is_read_is_told_of() -> None:
    sources = [p.read_text() for folder in ("agentmesh", "agents", "tools") for p in (ROOT / folder).rglob("*.py")]
    read = {name for text in sources for name in READ.findall(text)} - BETWEEN_OUR_PROCESSES - THE_PLATFORMS
    assert len(read) >= 8
    assert {name for name in read if f"`{name}`" not in PAGE} == set()
