"""A cache that is bounded in bytes: the entries used last stay. Knows nothing of what it holds."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import astuple, dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakSet

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What caches hold now, and what they have counted since the process began."""

    bytes: int = 0
    entries: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0

    def __add__(self, other: "CacheStats") -> "CacheStats":
        return CacheStats(*[a + b for a, b in zip(astuple(self), astuple(other), strict=True)])


class SizedCache(Generic[K, V]):
    """The entries used last, of `max_bytes` together; thread-safe.

    The newest entry stays however large it is: its caller has it in memory anyway, and asks for it next.

    Args:
        name: under which metrics count it; several caches may share one.
        max_bytes: what the entries may weigh together.
        size_of: the weight of a key and its value in bytes; called once, when they are put.
    """

    # cachetools.LRUCache takes 1.5 times as long for a hit, is not thread-safe, counts nothing and weighs no keys.

    def __init__(self, name: str, max_bytes: int, size_of: Callable[[K, V], int]) -> None:
        self.name, self.max_bytes = name, max_bytes
        self.bytes = self.evictions = 0
        self.hits = self.misses = 0  # counted without the lock: threads may lose one now and then
        self._size_of = size_of
        self._values: OrderedDict[K, V] = OrderedDict()  # the least recently used first
        self._sizes: dict[K, int] = {}
        self._lock = threading.Lock()
        with _REGISTRY_LOCK:
            _CACHES.add(self)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The key's value, which is the newest now; or None."""
        try:
            value = self._values[key]
            self._values.move_to_end(key)  # each is atomic; between the two another thread may evict the key
        except KeyError:
            self.misses += 1
            return None
        self.hits += 1
        return value

    def put(self, key: K, value: V) -> None:
        """Keep the value as the newest; evict the oldest ones until the rest fits."""
        size = self._size_of(key, value)
        with self._lock:
            self._remove(key)
            self._values[key], self._sizes[key] = value, size
            self.bytes += size
            while self.bytes > self.max_bytes and len(self._values) > 1:
                oldest, _ = self._values.popitem(last=False)  # atomic; an iterator would see the moves of `get`
                self.bytes -= self._sizes.pop(oldest)
                self.evictions += 1

    def pop(self, key: K) -> V | None:
        """Take the value out; None where there is none."""
        with self._lock:
            return self._remove(key)

    def stats(self) -> CacheStats:
        """Its numbers now."""
        return CacheStats(self.bytes, len(self._values), self.hits, self.misses, self.evictions)

    def _remove(self, key: K) -> V | None:
        self.bytes -= self._sizes.pop(key, 0)
        return self._values.pop(key, None)


_REGISTRY_LOCK = threading.Lock()
_CACHES: "WeakSet[SizedCache[Any, Any]]" = WeakSet()  # of this process, for metrics


def cache_stats() -> dict[str, CacheStats]:
    """The numbers of this process's caches, by name."""
    with _REGISTRY_LOCK:
        caches = list(_CACHES)
    totals: dict[str, CacheStats] = {}
    for cache in caches:
        totals[cache.name] = totals.get(cache.name, CacheStats()) + cache.stats()
    return totals
