"""What starting costs: what a crew's file imports, `agentmesh --help`, and a first run from cold.

python bench/start.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import fake_server, machine, median

HEAVY = (
    "celery",
    "kombu",
    "redis",
    "torch",
    "transformers",
    "faiss",
    "numpy",
    "langchain",
    "langchain_core",
    "aiohttp",
    "rich",
    "typer",
)
LOOK = f"""
import time
t = time.perf_counter()
import sys
from agentmesh import Agent, Crew, run, tool
print(time.perf_counter() - t, [m for m in {HEAVY!r} if m in sys.modules])
"""
CREW = """
from agentmesh import Agent, Crew
class Poet(Agent):
    "Writes."
crew = Crew(Poet(), model="openai:fake")
"""


def timed(argv: list[str], **how: object) -> float:
    """Wall seconds of a command."""
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)  # type: ignore[call-overload]
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    print(machine())
    argv = [sys.executable, "-c", LOOK]
    looks = [subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split(" ", 1) for _ in range(9)]
    bare = median([timed([sys.executable, "-c", "pass"]) for _ in range(9)])
    print(
        f"imports of a crew       {median([float(x[0]) for x in looks]):.3f} s   heavy modules loaded: {looks[0][1].strip()}"
        f"   (bare python {bare:.3f} s)"
    )
    helps = [timed([sys.executable, "-m", "agentmesh.cli.main", "--help"]) for _ in range(9)]
    print(f"agentmesh --help        {median(helps):.3f} s")
    with fake_server() as url:
        colds, warms = [], []
        for _ in range(3):
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                (Path(folder) / "crew.py").write_text(CREW)
                env = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k"}
                argv = [sys.executable, "-m", "agentmesh.cli.main", "run", "crew.py", "the sea"]
                colds.append(timed(argv, cwd=folder, env=env))
                warms.append(timed(argv, cwd=folder, env=env))
    print(
        f"first run from cold     {median(colds):.2f} s   (embedded Valkey, worker process, one LLM call); the second {median(warms):.2f} s"
    )


if __name__ == "__main__":
    main()
