"""How late a token is: from the engine's step that made it until a client of `run.tokens()` has it.

    python bench/gpu_stream.py [--streams 64] [--step-ms 50] [--tokens 60]

Every stream is a run of its own and all are listened to at once, in one process. In place of the model there is a loop whose
tokens are the milliseconds at which they were made, by the clock that all processes of a machine share.
"""

import argparse
import asyncio
import re
import time

from common import cpu_s, machine, valkey
from gpu_slots import working

from agentmesh.engine.run import Run

WAIT_S = 120


async def heard(run: "Run[int]", lags: list[float]) -> None:
    """The lag of every whole stamp of one stream, in ms."""
    rest = ""
    async for token in run.aio.live():
        now_ms = time.monotonic() * 1000
        if token.kind == "text":
            rest += token.text
            *whole, rest = rest.split(" ")
            lags += [now_ms - float(w) for w in whole if re.fullmatch(r"\d+", w)]


async def listen(runs: "list[Run[int]]") -> list[float]:
    """All lags of all streams, in ms."""
    lags: list[float] = []
    await asyncio.wait_for(asyncio.gather(*[heard(r, lags) for r in runs]), WAIT_S)
    return sorted(lags)


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=47, help="no multiple of the 30 ms at which streams are sent")
    parser.add_argument("--tokens", type=int, default=60)
    given = parser.parse_args()
    print(machine(), flush=True)
    settings = {"step_s": given.step_ms / 1000, "stamps": 1, "spread": 0, "new_tokens": given.tokens}
    with valkey() as store, working(store, 1, **settings) as (mesh, devices, _):
        runs = [mesh.start(mesh.crew.agents["One"], i, stream=True) for i in range(given.streams)]
        before = cpu_s(devices[0])
        lags = asyncio.run(listen(runs))
        cpu_ms = 1e3 * (cpu_s(devices[0]) - before)
    at = {p: lags[min(len(lags) - 1, round(len(lags) * p / 100))] for p in (50, 95, 99)}
    print(
        f"{given.streams} streams, {len(lags)} tokens: lag p50 {at[50]:.0f} ms · p95 {at[95]:.0f} ms · p99 {at[99]:.0f} ms · "
        f"the worker's CPU {cpu_ms / max(1, len(lags)):.2f} ms a token"
    )


if __name__ == "__main__":
    main()
