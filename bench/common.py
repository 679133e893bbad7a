"""What the benchmarks share: a Valkey of their own, the fake server as a process, CPU of processes, medians."""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from agentmesh.runtime.valkey import EmbeddedValkey

TICK = os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def valkey() -> Iterator[EmbeddedValkey]:
    """An embedded Valkey in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        server = EmbeddedValkey.join(Path(folder))
        try:
            yield server
        finally:
            server.leave()
            time.sleep(0.3)


@contextlib.contextmanager
def fake_server(*, latency_s: float = 0.0, rounds: int = 1) -> Iterator[str]:
    """The fake OpenAI server as a process of its own, so that its CPU is nobody else's."""
    argv = [sys.executable, "-m", "agentmesh.testing.fake_openai", "--latency", str(latency_s), "--rounds", str(rounds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def cpu_s(pid: int) -> float:
    """User and system CPU seconds of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def valkey_cpu_s(url: str) -> float:
    """CPU seconds of the Valkey server, by its own account."""
    import redis

    with redis.Redis.from_url(url) as client:
        info = client.info("cpu")
    return float(info["used_cpu_sys"] + info["used_cpu_user"])  # type: ignore[index]


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def machine() -> str:
    """What it ran on."""
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else "?"
    return f"{os.cpu_count()} x {name}, Python {sys.version.split()[0]}, load {os.getloadavg()[0]:.1f}"
