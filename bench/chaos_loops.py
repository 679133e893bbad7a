"""Two loops: the store's link cut after the k-th command and the worker killed; tools that may run once, and many kills."""

from typing import Any


def kth(given: Any) -> list[str]:
    return []


def once(given: Any) -> list[str]:
    return []
