"""One thing that the doctor looked at."""

from collections.abc import Iterable
from dataclasses import dataclass

from agentmesh.cli.exits import DONE, SURROUNDINGS


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; with `ok` a `mend` is only for those who need it."""

    ok: bool
    what: str
    mend: str = ""


def say(findings: Iterable[Finding]) -> int:
    """Print each as it comes; 0 when nothing needs mending."""
    all_ok = True
    for finding in findings:
        all_ok = all_ok and finding.ok
        mend = f"\n      -> {finding.mend}" if finding.mend else ""
        print(f"{'ok  ' if finding.ok else 'help'}  {finding.what}{mend}", flush=True)
    return DONE if all_ok else SURROUNDINGS
