"""What a shared beginning of prompts saves: agents with the same long instructions, beside agents with each their own.

    python bench/gpu_prefix.py [--agents 8] [--prefix 1500]

The engine alone, each way in a fresh one. Time to first token is counted from when all were handed in together.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from common import machine

from agentmesh.inference.batching import Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import InferenceRequest
from agentmesh.models.local import LocalModel

NEW_TOKENS, TAIL = 8, 40


def prompts(agents: int, prefix: int, *, shared: bool, vocabulary: int = 40_000) -> list[tuple[int, ...]]:
    """Random tokens; where nothing is shared each begins with its own."""
    draw = torch.Generator().manual_seed(agents)

    def some(n: int) -> list[int]:
        return torch.randint(100, vocabulary, (n,), generator=draw).tolist()

    head = some(prefix)
    return [(*(head if shared else some(prefix)), *some(TAIL)) for _ in range(agents)]


def measured(engine: InferenceEngine, asked: list[tuple[int, ...]]) -> tuple[float, float, int]:
    """Seconds until all were answered, median seconds to a first token, prompt tokens computed."""
    first: dict[int, float] = {}
    began = time.perf_counter()

    def hearing(i: int) -> object:
        return lambda tokens: first.setdefault(i, time.perf_counter() - began) < 0

    before = engine.gauge
    for future in [engine.submit(InferenceRequest(t, NEW_TOKENS), hearing(i)) for i, t in enumerate(asked)]:  # type: ignore[arg-type]
        future.result(600)
    wall, now = time.perf_counter() - began, engine.gauge
    computed = now.prompt_tokens - now.cached_tokens - before.prompt_tokens + before.cached_tokens
    return wall, statistics.median(first.values()), computed


def compared(model: Any, agents: int, prefix: int, shape: Shape | None = None, *, vocabulary: int = 40_000) -> None:
    """Print the table."""
    found = {}
    for shared in (True, False):
        engine = InferenceEngine(model, shape)
        engine.submit(InferenceRequest((5, 6, 7), 2)).result(600)  # what a first step costs is not counted
        asked = prompts(agents, prefix, shared=shared, vocabulary=vocabulary)
        found[shared] = wall, first, computed = measured(engine, asked)
        engine.close()
        name = "shared" if shared else "their own"
        said = f"{computed:7d} prompt tokens computed · first token {first:6.2f} s · all {wall:6.2f} s"
        print(f"{name:<10} {said}", flush=True)
    (one, two) = found[True], found[False]
    print(
        f"saved      {1 - one[2] / two[2]:.0%} of the prompt tokens, {1 - one[1] / two[1]:.0%} of the time to a first token"
    )


def main() -> None:
    """Print what it says above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=1500)
    given = parser.parse_args()
    model = LocalModel("smollm2").prepare()._model
    print(f"{given.agents} agents, {given.prefix} tokens of instructions, {model.device}; {machine()}")
    compared(model, given.agents, given.prefix)


if __name__ == "__main__":
    main()
