"""What `agentmesh serve` adds to a request: latency and CPU, beside the model server asked without it.

    python bench/serve.py [--requests 400] [--at-once 100] [--latency 0.3]

The same requests, by the same lean HTTP client, go to the fake model server itself and to an endpoint before it, whole and as
streams; each is a run there, with a worker process of its own. `added` is the endpoint's p50 latency beyond the model's; CPU is
of the endpoint, and of worker and Valkey together, for each request. At the end: what connections are left after a second.
"""

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from common import cpu_s, fake_server, machine, median, valkey, valkey_cpu_s

from agentmesh.testing.hosts import children

CREW = str(Path(__file__).parent / "crew.py")


async def ask(url: str, count: int, at_once: int, *, stream: bool) -> list[float]:
    """Seconds of each of so many requests."""
    room = asyncio.Semaphore(at_once)
    body: dict[str, Any] = {"model": "openai:fake", "stream": stream, "messages": [{"role": "user", "content": "tea"}]}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> float:
            async with room:
                began = time.perf_counter()
                async with session.post(f"{url}/chat/completions", json=body) as response:
                    text = await response.text()
                    if response.status != 200 or "done" not in text:
                        raise RuntimeError(f"{response.status}: {text[:300]}")
                return time.perf_counter() - began

        return await asyncio.gather(*[one() for _ in range(count)])


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--at-once", type=int, default=100)
    parser.add_argument("--latency", type=float, default=0.3)
    given = parser.parse_args()
    print(machine())
    with valkey() as store, fake_server(latency_s=given.latency) as model:
        env = {**os.environ, "OPENAI_BASE_URL": model, "OPENAI_API_KEY": "k", "AGENTMESH_BROKER": store.broker_url}
        argv = [sys.executable, "-m", "agentmesh.cli.main", "serve", CREW, "--model", "openai:fake", "--port", "0"]
        served = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
        assert served.stderr is not None
        found = re.search(r"http://\S+/v1", line := served.stderr.readline())
        if found is None:
            raise SystemExit(line + served.stderr.read())
        try:
            asyncio.run(ask(found[0], 20, 20, stream=False))
            for stream in (False, True):
                alone = asyncio.run(ask(model, given.requests, given.at_once, stream=stream))
                workers = list(children(served.pid).values())
                before = cpu_s(served.pid), sum(map(cpu_s, workers)) + valkey_cpu_s(store.url)
                took = asyncio.run(ask(found[0], given.requests, given.at_once, stream=stream))
                front = (cpu_s(served.pid) - before[0]) / given.requests * 1e3
                behind = (sum(map(cpu_s, workers)) + valkey_cpu_s(store.url) - before[1]) / given.requests * 1e3
                alone_ms, served_ms = median(alone) * 1e3, median(took) * 1e3
                print(
                    f"{'stream' if stream else 'whole '}  p50 of the model alone {alone_ms:.0f} ms   served {served_ms:.0f} ms   "
                    f"added {served_ms - alone_ms:.0f} ms   CPU endpoint {front:.2f} ms, behind it {behind:.2f} ms"
                )
            time.sleep(1)
            print(f"file descriptors of the endpoint afterwards: {len(os.listdir(f'/proc/{served.pid}/fd'))}")
        finally:
            served.send_signal(signal.SIGTERM)
            served.communicate()


if __name__ == "__main__":
    main()
