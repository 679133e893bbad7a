"""The abstract store that the protocol is written over: hashes, lists, sets and sorted sets by key.

Only what Redis has and with its meaning, so that each verb's Lua script can be read beside its Python.
"""

from collections import defaultdict
from typing import Any


class Tables:
    """A store in memory. Hash values may be any JSON value (Lua keeps dicts as JSON text)."""

    def __init__(self) -> None:
        self.hashes: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        self.lists: defaultdict[str, list[str]] = defaultdict(list)
        self.sets: defaultdict[str, set[str]] = defaultdict(set)
        self.zsets: defaultdict[str, dict[str, int]] = defaultdict(dict)

    # hashes
    def hget(self, key: str, field: str) -> Any:
        """The value, or None."""
        return self.hashes[key].get(field)

    def hset(self, key: str, field: str, value: Any) -> None:
        """Set one field."""
        self.hashes[key][field] = dict(value) if isinstance(value, dict) else value

    def hdel(self, key: str, field: str) -> None:
        """Drop one field, if there."""
        self.hashes[key].pop(field, None)

    def hincr(self, key: str, field: str, by: float = 1) -> float:
        """Add and answer the sum; a missing field is 0."""
        value: float = self.hashes[key].get(field, 0) + by
        self.hashes[key][field] = value
        return value

    # lists
    def push(self, key: str, text: str) -> int:
        """Append; answers the new length."""
        self.lists[key].append(text)
        return len(self.lists[key])

    def length(self, key: str) -> int:
        """How many."""
        return len(self.lists[key])

    def tail(self, key: str, after: int) -> list[str]:
        """Everything after the first `after`."""
        return self.lists[key][after:]

    # sets
    def sadd(self, key: str, member: str) -> bool:
        """Whether it is new."""
        new = member not in self.sets[key]
        self.sets[key].add(member)
        return new

    def srem(self, key: str, member: str) -> None:
        """Drop it, if there."""
        self.sets[key].discard(member)

    def smembers(self, key: str) -> list[str]:
        """All, sorted, so that two journals go through them alike."""
        return sorted(self.sets[key])

    def sismember(self, key: str, member: str) -> bool:
        """Whether it is there."""
        return member in self.sets[key]

    # sorted sets
    def zadd(self, key: str, member: str, score: int) -> None:
        """Set its score."""
        self.zsets[key][member] = score

    def zrem(self, key: str, member: str) -> None:
        """Drop it, if there."""
        self.zsets[key].pop(member, None)

    def zscore(self, key: str, member: str) -> int | None:
        """Its score, or None."""
        return self.zsets[key].get(member)

    def zupto(self, key: str, score: int, limit: int) -> list[str]:
        """Members with a score of at most `score`, lowest first, `limit` at most."""
        ranked = sorted((s, m) for m, s in self.zsets[key].items() if s <= score)
        return [m for _, m in ranked[:limit]]
