"""Starts and restarts worker processes, bounds their drain and leaves no orphan. Loads no Celery.

A worker's command line gets `--worker-name NAME --ready-fd FD` at its end. The worker calls `exit_with_parent` first
and `announce_ready` once it consumes (process.py).
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO, Any

from agentmesh.worker.process import FORCED_EXIT_CODE, Command, StandbyWorker, WorkerSlot, kill_group

logger = logging.getLogger("agentmesh.supervise")

WATCHER_JOIN_S = 5.0  # how long the last on_death may take
NEWS_POLL_S = 0.5  # a signal that comes just before the wait for news does not end that wait
STANDBY_POLL_S = 2.0  # how often standby workers are asked whether they are needed; after a death at once
# A worker that exits with one of these before it was ever ready would do so each time: wrong use, or environment.
FATAL_EXIT_CODES = (2, 4)


class Supervisor:
    """Keeps one worker process running per command, until it is told to stop.

    Args:
        workers: commands, or their bare command lines.
        standby: workers that are started when they are needed; `health` does not count them.
        on_death: gets the dead worker's name and exit code, on a thread of its own: it releases what the worker held.
        drain_s: how long workers may take to finish what runs.
        env: added to the environment of the workers.
        output: where the workers' stdout and stderr go; the supervisor's own when None.
    """

    def __init__(
        self, workers: Sequence[Command | Sequence[str]], *, standby: Sequence[StandbyWorker] = (),
        on_death: Callable[[str, int], None] | None = None, drain_s: float = 30.0,
        env: Mapping[str, str] | None = None, output: "int | IO[Any] | None" = None,
    ) -> None:  # fmt: skip
        self._permanent = [WorkerSlot(w if isinstance(w, Command) else Command(tuple(w))) for w in workers]
        self._standby = [WorkerSlot(worker.command, worker) for worker in standby]
        self._workers = [*self._permanent, *self._standby]
        self._on_death, self._drain_s, self._output = on_death, drain_s, output
        self._env = {**os.environ, **(env or {})}
        self._news: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._watchers: set[threading.Thread] = set()
        self._all_ready = threading.Event()
        self._ended = threading.Event()
        self._poll_now = threading.Event()  # ask the standby workers at once
        self._stops = 0
        self._quiet = False
        self._drain_ends = 0.0
        self._code = 0

    @property
    def names(self) -> list[str]:
        """The names of the workers that run."""
        return [w.name for w in self._workers if w.process is not None]

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the workers that run, by name."""
        return {w.name: w.process.pid for w in self._workers if w.process is not None}

    @property
    def health(self) -> tuple[int, int]:
        """How many workers there should be, and how many of them consume."""
        return len(self._permanent), sum(w.ready for w in self._permanent)

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether every worker consumes; returns early, with False, when the supervisor has ended."""
        until = time.monotonic() + timeout_s
        while not self._all_ready.wait(0.01):
            if self._ended.is_set() or time.monotonic() > until:
                return False
        return True

    def run(self) -> int:
        """Supervise until stopped. On the main thread SIGTERM and SIGINT stop it, and a second one kills at once.

        Returns:
            0 after a drain; 1 when something had to be killed at its end; 128 + n after a second signal n; a worker's
            own exit code when that was 2 or 4 before any worker of its slot was ready.
        """
        before = self._take_signals()
        if self._standby:
            self._watch(self._poll_standbys)
        try:
            while not (self._stops and not self.names):
                self._start_due()
                self._handle_news()
                self._kill_overdue()
        finally:
            self._stops += 1
            self._poll_now.set()
            self._kill()
            for watcher in tuple(self._watchers):
                watcher.join(WATCHER_JOIN_S)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._ended.set()
        return self._code

    def start(self) -> None:
        """Supervise on a thread of its own; no signal is touched."""
        threading.Thread(target=self.run, name="agentmesh-supervisor", daemon=True).start()

    def stop(self, *, now: bool = False, quiet: bool = False) -> None:
        """Ask for the end, from any thread: a drain, or a kill with `now`. With `quiet`, no warning of a kill at its end."""
        self._quiet = quiet
        self._news.put((self._on_stop, 0, now))

    def join(self, timeout_s: float) -> bool:
        """Whether it has ended within the time."""
        return self._ended.wait(timeout_s)

    # ---- events ----

    def _take_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}

        def on_signal(number: int, frame: FrameType | None) -> None:
            self._news.put((self._on_stop, number, False))  # a SimpleQueue may be put to from a signal handler

        return {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle_news(self) -> None:
        times = [w.due for w in self._workers if w.process is None and not self._stops]
        times += [self._drain_ends] if self._stops else []
        wait_s = min(NEWS_POLL_S, max(0.0, min(times) - time.monotonic())) if times else NEWS_POLL_S
        with contextlib.suppress(queue.Empty):
            handler, *args = self._news.get(timeout=wait_s)
            handler(*args)

    def _on_stop(self, number: int, now: bool) -> None:
        self._stops += 1
        self._drain_ends = time.monotonic() + self._drain_s
        if self._stops == 1 and not now:
            for worker in self._workers:
                if worker.process is not None:
                    worker.process.terminate()  # the process alone: Celery ends the processes of a pool itself
            return
        self._code = 128 + number if number else self._code
        self._kill()

    def _on_ready(self, worker: WorkerSlot, process: "subprocess.Popen[bytes]") -> None:
        if worker.process is process:
            worker.ready = worker.ever_ready = True
        if all(w.ready for w in self._permanent) and not self._all_ready.is_set():
            logger.info("ready: %d worker processes take steps", len(self._permanent))
            self._all_ready.set()

    def _on_exit(self, worker: WorkerSlot, code: int) -> None:
        ever_ready = worker.ever_ready
        worker.on_exit(time.monotonic())
        if self._stops or (worker.standby and not code):
            return
        if code in FATAL_EXIT_CODES and not ever_ready and not worker.standby:
            self._code = code
            self._on_stop(0, False)
            return
        when = "when it is needed" if worker.standby else f"in {worker.restart_s:.2f} s"
        logger.warning("worker %s exited with code %d; restarting %s", worker.name, code, when)
        worker.back_off()

    def _poll_standbys(self) -> None:
        """On a thread of its own: a standby worker that is asked may wait for a journal that does not respond."""
        while not self._stops:
            self._poll_now.wait(STANDBY_POLL_S)
            self._poll_now.clear()
            for slot in self._standby:
                if not self._stops and slot.process is None and slot.standby is not None and _is_needed(slot.standby):
                    self._news.put((slot.request_start,))
        for slot in self._standby:
            if slot.standby is not None:
                slot.standby.close()

    def _kill_overdue(self) -> None:
        if self._stops and self.names and time.monotonic() >= self._drain_ends:
            if not self._quiet:
                logger.warning("killed after a drain of %.0f s: %s", self._drain_s, ", ".join(self.names))
            self._code = self._code or FORCED_EXIT_CODE
            self._drain_ends = time.monotonic() + self._drain_s
            self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                kill_group(worker.process.pid)

    # ---- processes ----

    def _start_due(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is None and not self._stops and worker.due <= now:
                self._spawn(worker)

    def _spawn(self, worker: WorkerSlot) -> None:
        ready_read = worker.start(self._output, self._env)
        self._watch(self._wait_for_ready, worker, worker.process, ready_read)
        self._watch(self._reap, worker, worker.process, worker.name)

    def _watch(self, target: Callable[..., None], *args: Any) -> None:
        def watched() -> None:
            try:
                target(*args)
            finally:
                self._watchers.discard(threading.current_thread())

        thread = threading.Thread(target=watched, name="agentmesh-watcher", daemon=True)
        self._watchers.add(thread)
        thread.start()

    def _wait_for_ready(self, worker: WorkerSlot, process: "subprocess.Popen[bytes]", ready_fd: int) -> None:
        try:
            if os.read(ready_fd, 1):
                self._news.put((self._on_ready, worker, process))
        finally:
            os.close(ready_fd)

    def _reap(self, worker: WorkerSlot, process: "subprocess.Popen[bytes]", name: str) -> None:
        code = process.wait()
        kill_group(process.pid)  # what a killed worker leaves of its prefork pool
        if process.stdin is not None:
            process.stdin.close()
        self._news.put((self._on_exit, worker, code))
        if self._on_death is not None:
            try:
                self._on_death(name, code)
            except Exception:
                logger.exception("could not release the leases of worker %s; they expire on their own", name)
        self._poll_now.set()  # a death may make suspects


def _is_needed(worker: StandbyWorker) -> bool:
    try:
        return worker.is_needed()
    except Exception:
        logger.exception("could not find out whether a standby worker is needed; asking again")
        return False
