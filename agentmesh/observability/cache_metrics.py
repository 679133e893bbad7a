"""Metrics of this process's caches: size, hits, misses and evictions."""

import os
import time
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, multiprocess

from agentmesh.sized_cache import CacheStats, cache_stats

REFRESH_S = 1.0


class CacheMetrics:
    """Gauges and counters by cache name, summed over all living processes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._bytes = Gauge(
            "agentmesh_cache_bytes",
            "Bytes that caches hold",
            ("cache",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._entries = Gauge(
            "agentmesh_cache_entries", "Entries of caches", ("cache",), registry=registry, multiprocess_mode="livesum"
        )
        self._lookups = Counter("agentmesh_cache_lookups", "Lookups in caches", ("cache", "outcome"), registry=registry)
        self._evictions = Counter("agentmesh_cache_evictions", "Entries evicted", ("cache",), registry=registry)
        self._counted: dict[str, CacheStats] = {}
        self._pid, self._next = os.getpid(), 0.0

    def refresh(self) -> None:
        """Copy the caches' statistics into the metrics, at most once a second."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REFRESH_S
        if self._pid != os.getpid():  # forked: the parent's counts are in the parent's file
            self._pid, self._counted = os.getpid(), cache_stats()
        for name, stats in cache_stats().items():
            before = self._counted.get(name, CacheStats())
            self._counted[name] = stats
            self._bytes.labels(name).set(stats.bytes)
            self._entries.labels(name).set(stats.entries)
            # `max`: the counts of a garbage-collected cache are gone
            self._lookups.labels(name, "hit").inc(max(0, stats.hits - before.hits))
            self._lookups.labels(name, "miss").inc(max(0, stats.misses - before.misses))
            self._evictions.labels(name).inc(max(0, stats.evictions - before.evictions))


def remove_gauges_of_dead(folder: str) -> None:
    """Remove the gauges of dead processes from a folder of metrics: their caches do not exist any more."""
    for file in Path(folder).glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        with suppress(PermissionError):  # it is alive, and another user's
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                multiprocess.mark_process_dead(int(pid), folder)  # type: ignore[no-untyped-call]
