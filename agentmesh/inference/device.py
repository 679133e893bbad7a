"""A device: the lock for its turns, the dtype of weights, its memory, and the errors that break it."""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import psutil
import torch

HolderKind = Literal["step", "batch"]
RECENT_S = 1.0  # an engine that made a step within this time has work
FIRST_S = 0.05  # assumed length of a step before one has ended
WEIGHT = 0.2  # of the last step in the running mean of how long they take


class DeviceLock:
    """The turns of one device in this process; thread-safe.

    Args:
        shared: no one waits; only the length of steps is measured.

    Attributes:
        engines: those on the device; without one, batches go side by side.
        reserved_bytes: of the device's memory, which encoders need for their largest batch and engines leave free.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.shared = shared
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.reserved_bytes = 0
        self._lock = threading.Lock()
        self._waiting: dict[HolderKind, deque[threading.Lock]] = {"step": deque(), "batch": deque()}
        self._holder: HolderKind | None = None
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
        """Mean seconds of a step, where an engine has work; 0 where none has."""
        with self._lock:
            stepping = self._holder == "step" or bool(self._waiting["step"])
            if stepping or (self._mean_s and time.monotonic() - self._stepped_s < RECENT_S):
                return self._mean_s or FIRST_S
            return 0.0

    @property
    def held_s(self) -> float:
        """Seconds for which the lock has been held; 0 where it is free."""
        with self._lock:
            return time.monotonic() - self._since_s if self._holder else 0.0

    def _take(self, kind: HolderKind) -> None:
        if self.shared:
            return
        with self._lock:
            if self._holder is None:  # then no thread waits
                self._holder, self._since_s = kind, time.monotonic()
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting[kind].append(gate)
        try:
            gate.acquire()  # `_give` of the holder releases it
        except BaseException:  # a Ctrl-C in the main thread
            with self._lock:
                left = gate in self._waiting[kind]
                if left:
                    self._waiting[kind].remove(gate)
            if not left:
                self._give(kind)
            raise

    def _give(self, kind: HolderKind) -> None:
        if self.shared:
            return
        other: HolderKind = "batch" if kind == "step" else "step"
        with self._lock:
            following = other if self._waiting[other] else kind
            if not self._waiting[following]:
                self._holder = None
                return
            self._holder, self._since_s = following, time.monotonic()
            self._waiting[following].popleft().release()


_locks: dict[str, DeviceLock] = {}
os.register_at_fork(after_in_child=_locks.clear)  # a child has none of the threads that hold them


def lock_of(device: str) -> DeviceLock:
    """The turns of a device, as torch names it: `cpu`, `cuda:0`."""
    return _locks.setdefault(device, DeviceLock(shared=device == "cpu"))


# ---- The dtype of a model's weights on a device -------------------------------------------------


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU, and where the processor multiplies it in hardware; else float32."""
    if device == "cuda":
        return torch.bfloat16
    # torch names the best vector unit, not AMX or AVX512_BF16: ask for those by their own name
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if probe() or amx() else torch.float32


# ---- What a device's memory holds ---------------------------------------------------------------


class Memory(NamedTuple):
    """In bytes.

    Args:
        used: of the machine's memory, by this process.
        free, all: of a GPU, by all processes; 0 on a CPU.
    """

    used: int
    free: int = 0
    all: int = 0


def memory_of(device: torch.device) -> Memory:
    """The memory of a device now."""
    used = psutil.Process().memory_info().rss
    return Memory(used, *torch.cuda.mem_get_info(device)) if device.type == "cuda" else Memory(used)


# ---- What torch's errors mean for a process that has a device -----------------------------------

CUDA_LIBRARIES = ("CUDA", "cuDNN", "CUBLAS")  # in the text of a RuntimeError, which has no other mark


def breaks_device(error: Exception) -> bool:
    """Whether this process can no longer use its device."""
    return not isinstance(error, torch.OutOfMemoryError) and any(name in str(error) for name in CUDA_LIBRARIES)
