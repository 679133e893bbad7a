"""The caches of all processes in one page of metrics; those of dead ones hold nothing."""

import os
import subprocess
import sys
from pathlib import Path

COUNTS = """
import sys
from prometheus_client import CollectorRegistry
from agentmesh.observability.cache_metrics import CacheMetrics
from agentmesh.sized_cache import SizedCache
cache = SizedCache("texts", 10, lambda key, value: len(value))
metrics = CacheMetrics(CollectorRegistry())
for key in "abc":
    cache.get(key)
    cache.put(key, "xxxxx")
cache.get("c")
metrics.refresh()
metrics.refresh()
print("counted", flush=True)
sys.stdin.read()
"""
PAGE = """
import sys
from wsgiref.util import setup_testing_defaults
from agentmesh.observability.metrics import metrics_app
environ = {}
setup_testing_defaults(environ)
print(b"".join(metrics_app(sys.argv[1], lambda: None, lambda: (0, 0))(environ, lambda *head: None)).decode())
"""


def test_caches_of_all_processes_are_added_up(tmp_path: Path) -> None:
    def start() -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", COUNTS], env=env, stdin=pipe, stdout=pipe, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
        return process

    def lines() -> set[str]:
        page = subprocess.run(
            [sys.executable, "-c", PAGE, str(tmp_path)], env=env, capture_output=True, text=True, check=True
        )
        return {line for line in page.stdout.splitlines() if line.startswith("agentmesh_cache")}

    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    processes = [start() for _ in range(2)]
    counters = {
        'agentmesh_cache_lookups_total{cache="texts",outcome="hit"} 2.0',
        'agentmesh_cache_lookups_total{cache="texts",outcome="miss"} 6.0',
        'agentmesh_cache_evictions_total{cache="texts"} 2.0',
    }
    try:
        gauges = {'agentmesh_cache_bytes{cache="texts"} 20.0', 'agentmesh_cache_entries{cache="texts"} 4.0'}
        assert lines() == counters | gauges
        processes[0].kill()
        processes[0].wait()
        gauges = {'agentmesh_cache_bytes{cache="texts"} 10.0', 'agentmesh_cache_entries{cache="texts"} 2.0'}
        assert lines() == counters | gauges  # what a dead one has counted stays counted
    finally:
        for process in processes:
            process.kill()
            process.communicate()
