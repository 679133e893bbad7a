"""The same run as plain Celery tasks: ask | tool | ask on a threads pool, results in Redis. What a Celery user writes today."""

import json
import os
import sys
import threading
import time
from typing import Any

import openai
from celery import Celery, chain
from loop import TOOL

app = Celery("plain", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BROKER"])
app.conf.task_default_queue = "plain"
client = openai.OpenAI(api_key="k")


@app.task
def ask(messages: list[Any]) -> list[Any]:
    """One LLM call."""
    reply = client.chat.completions.create(model="fake", messages=messages, tools=[TOOL])
    return [*messages, reply.choices[0].message.model_dump(exclude_none=True)]


@app.task
def call(messages: list[Any]) -> list[Any]:
    """The tool calls of the last message."""
    for wanted in messages[-1].get("tool_calls", []):
        word = json.loads(wanted["function"]["arguments"])["word"]
        messages.append({"role": "tool", "tool_call_id": wanted["id"], "content": f"meaning of {word}"})
    return messages


def main(runs: int, at_once: int) -> None:
    """So many runs, so many at a time, with a worker in a child process."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        app.worker_main(
            ["worker", "-P", "threads", "-c", str(at_once), "--without-mingle", "--without-gossip", "-l", "ERROR"]
        )
        os._exit(0)
    room = threading.Semaphore(at_once)

    def one(i: int) -> None:
        with room:
            chain(ask.s([{"role": "user", "content": f"word{i}"}]), call.s(), ask.s()).apply_async().get(timeout=60)

    one(0)
    began, cpu = time.perf_counter(), time.process_time() + _cpu(pid)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(
        json.dumps({"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() + _cpu(pid) - cpu}), flush=True
    )
    os.kill(pid, 9)


def _cpu(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
