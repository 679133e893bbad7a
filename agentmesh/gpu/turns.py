"""Whose turn it is on a GPU: an engine's steps and the batches of encoders, one at a time. Knows no torch.

Two that compute there at once need their memory at once, and neither knows when it will be through. So each waits for its
turn; after a step a waiting batch goes, and after a batch a waiting step, however many wait. On a CPU they go side by side,
for each leaves much of the cores idle (`bench/gpu_embed.py`).
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

Kind = Literal["step", "batch"]
RECENT_S = 1.0  # an engine that made a step within this has work
FIRST_S = 0.05  # what a step is taken to last before one has ended
WEIGHT = 0.2  # of the last step in the running mean of how long they take


class Turn:
    """The turns of one device in this process; thread-safe.

    Args:
        shared: nobody waits; how long steps take is known all the same.

    Attributes:
        engines: those on the device; without one, batches go side by side.
        reserved_bytes: of the device's memory, which encoders need for their largest batch and engines leave free.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.shared = shared
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.reserved_bytes = 0
        self._lock = threading.Lock()
        self._waiting: dict[Kind, deque[threading.Lock]] = {"step": deque(), "batch": deque()}
        self._holder: Kind | None = None
        self._since_s = self._stepped_s = self._mean_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """An engine's step."""
        self._take("step")
        began = time.monotonic()
        try:
            yield
        finally:
            self._stepped_s = time.monotonic()
            took = self._stepped_s - began
            self._mean_s += (took - self._mean_s) * (WEIGHT if self._mean_s else 1)
            self._give("step")

    @contextmanager
    def batch(self) -> Iterator[None]:
        """A batch of an encoder, until its vectors are on the host."""
        if self.shared or not self.engines:
            yield
            return
        self._take("batch")
        try:
            yield
        finally:
            self._give("batch")

    @property
    def step_s(self) -> float:
        """How long a step takes, where an engine has work; 0 where none has."""
        with self._lock:
            stepping = self._holder == "step" or bool(self._waiting["step"])
            if stepping or (self._mean_s and time.monotonic() - self._stepped_s < RECENT_S):
                return self._mean_s or FIRST_S
            return 0.0

    @property
    def held_s(self) -> float:
        """For how long whoever has the turn has had it; 0 where nobody has."""
        with self._lock:
            return time.monotonic() - self._since_s if self._holder else 0.0

    def _take(self, kind: Kind) -> None:
        if self.shared:
            return
        with self._lock:
            if self._holder is None:  # then nobody waits either
                self._holder, self._since_s = kind, time.monotonic()
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting[kind].append(gate)
        try:
            gate.acquire()  # whoever gives the turn away opens it
        except BaseException:  # a Ctrl-C in the main thread
            with self._lock:
                left = gate in self._waiting[kind]
                if left:
                    self._waiting[kind].remove(gate)
            if not left:
                self._give(kind)
            raise

    def _give(self, kind: Kind) -> None:
        if self.shared:
            return
        other: Kind = "batch" if kind == "step" else "step"
        with self._lock:
            following = other if self._waiting[other] else kind
            if not self._waiting[following]:
                self._holder = None
                return
            self._holder, self._since_s = following, time.monotonic()
            self._waiting[following].popleft().release()


_turns: dict[str, Turn] = {}
os.register_at_fork(after_in_child=_turns.clear)  # a child has none of the threads that would give their turns away


def turn_of(device: str) -> Turn:
    """The turns of a device, as torch names it: `cpu`, `cuda:0`."""
    return _turns.setdefault(device, Turn(shared=device == "cpu"))
