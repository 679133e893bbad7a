"""The range of transformers: said in one place, and a release outside it is named before anything of it is imported."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from agentmesh.errors import ConfigError
from agentmesh.inference.compat import TESTED_RANGE, require_tested_version

ROOT = Path(__file__).parents[2]


def test_the_extra_and_the_check_have_one_range() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (declared,) = (r for r in map(Requirement, extras["local"]) if r.name == "transformers")
    assert declared.specifier == Requirement(f"transformers{TESTED_RANGE}").specifier


@pytest.mark.parametrize("installed", ["5.22.0", "5.23.4", "5.24.0", "5.24.1.dev0"])
def test_a_release_of_the_range_is_taken(installed: str) -> None:
    require_tested_version(installed)


@pytest.mark.parametrize("installed", ["4.57.1", "5.21.1", "5.25.0", "6.0.0"])
def test_a_release_outside_the_range_is_refused(installed: str) -> None:
    with pytest.raises(ConfigError, match=f"transformers {installed} is installed") as refused:
        require_tested_version(installed)
    assert refused.value.hint == f"pip install 'transformers{TESTED_RANGE}'"


def test_a_release_outside_the_range_ends_a_command_and_not_a_batch(tmp_path: Path) -> None:
    metadata = tmp_path / "transformers-5.99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.99.0\n")
    ended = subprocess.run(
        [sys.executable, "-c", "import agentmesh.models.local"], cwd=ROOT, text=True, capture_output=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"agentmesh.errors.ConfigError: transformers 5.99.0 is installed, and the local engine is tested with {TESTED_RANGE}; "
        f"pip install 'transformers{TESTED_RANGE}'"
    )
