"""The same crew as stock Celery: chains in a chord, with the settings that survive most; and processes of it to be killed.

Late acks, a visibility timeout of 5 s and a restore each second (the best of what was measured); the worker is respawned.
Each task appends a line when it ends, so that a step that ended twice is seen.
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from typing import Any

from celery import Celery, chain, chord
from chaos_crew import TOOL_S, note

app = Celery("plain", broker=os.environ.get("CHAOS_BROKER", "memory://"), backend=os.environ.get("CHAOS_BACKEND"))
app.conf.update(
    task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1, task_default_queue="plain",
    broker_transport_options={
        "visibility_timeout": 5, "unacked_restore_interval": 1, "unacked_restore_throttle": 1,
    },
    broker_connection_retry_on_startup=True,
)  # fmt: skip


def ended(step: str) -> None:
    """A step's end, for the oracle."""
    note(f"end:{step}")


def llm(messages: list[Any]) -> str:
    """One call to the fake server."""
    body = json.dumps({"model": "fake", "messages": messages}).encode()
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=30) as reply:
        text: str = json.load(reply)["choices"][0]["message"]["content"]
    return text


@app.task
def plan(task: str) -> str:
    """The planner's call."""
    text = llm([{"role": "user", "content": task}])
    ended(f"plan/{task}")
    return text


@app.task
def think(word: str) -> str:
    """A sub-agent's first call."""
    llm([{"role": "user", "content": word}])
    ended(f"think/{word}")
    return word


@app.task
def look_up(word: str) -> str:
    """Its tool."""
    note(word)
    time.sleep(TOOL_S)
    ended(f"look_up/{word}")
    return f"meaning of {word}"


@app.task
def conclude(found: str) -> str:
    """Its second call."""
    text = llm([{"role": "tool", "content": found, "tool_call_id": "c"}])
    ended(f"conclude/{found}")
    return text


@app.task
def write(notes: list[str]) -> str:
    """The writer's call."""
    text = llm([{"role": "user", "content": " | ".join(notes)}])
    ended(f"write/{notes[0]}")
    return text


@app.task(bind=True)
def fan(self: Any, planned: str) -> Any:
    """Four sub-agents, gathered: a chord in the place of this task."""
    parts = [chain(think.s(f"{planned}-{i}"), look_up.s(), conclude.s()) for i in range(4)]
    return self.replace(chord(parts, write.s()))


def start(task: str) -> Any:
    """A run; `.get` waits for it."""
    return chain(plan.s(task), fan.s()).apply_async()


class Workers:
    """So many `celery worker` processes on threads pools, each started again when it ends."""

    def __init__(self, count: int, env: dict[str, str]) -> None:
        self._env, self._over = {**os.environ, **env}, threading.Event()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._threads = [threading.Thread(target=self._keep, args=(f"p{i}",), daemon=True) for i in range(count)]

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run, by name."""
        return {name: p.pid for name, p in list(self.processes.items()) if p.poll() is None}

    def __enter__(self) -> "Workers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for process in list(self.processes.values()):
            process.kill()
        for thread in self._threads:
            thread.join()

    def _keep(self, name: str) -> None:
        argv = [sys.executable, "-m", "celery", "-A", "chaos_plain", "worker", "-n", f"{name}@%h", "-P", "threads", "-c", "40",
                "--without-mingle", "--without-gossip", "-l", "ERROR"]  # fmt: skip
        while not self._over.is_set():
            self.processes[name] = subprocess.Popen(
                argv, env=self._env, cwd=os.path.dirname(__file__), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self.processes[name].wait()
            self._over.wait(0.05)
