"""All figures of the engine on one device, and its tests there: at most 8 minutes, and nothing is downloaded.

    python bench/gpu_all.py [--shape 1b | tiny] [--minutes 8]

The model is made: its weights are drawn on the device by seed. `--shape tiny` is for a CPU, to see that the script works.
Figures are of this machine; compare the ratios.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from common import machine

ROOT = Path(__file__).parents[1]
ROUNDS = 3
LANES_S = 100.0  # it takes about half of it
GIB = 2**30


def device_line(device: str) -> str:
    """What it runs on."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device == "cpu":
        return f"{machine()}, {versions}"
    argv = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()[:1]
    ours, free = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()[0] / GIB
    return (
        f"{ours.name}, {ours.total_memory / GIB:.0f} GiB of which {free:.0f} free, compute capability {ours.major}.{ours.minor}, "
        f"driver {' '.join(driver) or '?'}, CUDA {torch.version.cuda}, {versions}; {machine()}"
    )


@contextmanager
def part(title: str, began: float) -> Iterator[None]:
    """A heading; what goes wrong below it is said, and the next part follows."""
    print(f"\n== {title} ({time.perf_counter() - began:.0f} s)", flush=True)
    try:
        yield
    except Exception as e:
        print(f"failed: {type(e).__name__}: {e}", flush=True)


def kernels_tried(model: Any) -> None:
    """Which attention kernels there are here and whether each says what the formula says."""
    from agentmesh.inference.kernels import Heads, difference, kernels, page_difference

    heads = Heads.of(model)
    print(f"{heads}, {model.dtype}")
    for kernel in kernels(model.device):
        told = difference(kernel, heads, model.device, model.dtype) or "right"
        pages = (
            f", pages: {page_difference(kernel, heads, 256, model.device, model.dtype) or 'right'}"
            if kernel.pages
            else ""
        )
        print(f"  {kernel.name:<20} {told}{pages}")


class Asked(NamedTuple):
    """How many random prompts of how many tokens, what is wanted of each, and the pages of the cache."""

    steps: int
    prompt_tokens: int
    new_tokens: int
    pages: int


def rate(model: Any, asked: Asked, attention: str = "", **how: Any) -> tuple[float, str]:
    """New tokens a second of a fresh engine, the best of some rounds, and its attention."""
    from agentmesh.inference.batching import Shape
    from agentmesh.inference.engine import InferenceEngine
    from agentmesh.inference.request import InferenceRequest

    engine, took = (
        InferenceEngine(model, Shape(pages=asked.pages, batch_requests=256, attention=attention)),
        list[float](),
    )
    try:
        for seed in range(ROUNDS):  # the first one warms up
            draw = torch.Generator().manual_seed(seed)
            prompts = torch.randint(100, model.config.vocab_size, (asked.steps, asked.prompt_tokens), generator=draw)
            began = time.perf_counter()
            for future in [
                engine.submit(InferenceRequest(tuple(p), asked.new_tokens, **how)) for p in prompts.tolist()
            ]:
                future.result(600)
            took.append(time.perf_counter() - began)
        return asked.steps * asked.new_tokens / min(took), engine._batching.attention
    finally:
        engine.close()


def attentions(model: Any, asked: Asked) -> None:
    """The chosen attention beside the others there are, and what drawing costs beside taking the likeliest token."""
    from agentmesh.inference.kernels import kernels

    print(f"{asked.steps} prompts of {asked.prompt_tokens} tokens, {asked.new_tokens} new tokens each")
    best, chosen = rate(model, asked)
    print(f"  {f'chosen: {chosen}':<28} {best:9.1f} new tokens/s", flush=True)
    for name in [*(k.name for k in kernels(model.device) if k.name != chosen), "sdpa"]:
        try:
            other, _ = rate(model, asked, name)
            print(f"  {name:<28} {other:9.1f} new tokens/s, the chosen one is {best / other:.1f} x", flush=True)
        except Exception as e:
            print(f"  {name:<28} {type(e).__name__}: {str(e)[:200]}")
    drawn, _ = rate(model, asked, temperature=0.8, top_p=0.95, seed=1)
    print(f"  {'drawn, with top_p':<28} {drawn:9.1f} new tokens/s, {drawn / best:.0%} of the likeliest tokens'")


def said_by(argv: list[str], most_s: float) -> list[str]:
    """The lines of a Python program of its own, which is interrupted when it takes longer."""
    env = {k: v for k, v in os.environ.items() if k != "AGENTMESH_CACHE" and not k.startswith("BENCH_")}
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        out, _ = process.communicate(timeout=most_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it stops the servers that it started
        out, _ = process.communicate(timeout=60)
        print(f"not done in {most_s:.0f} s")
    return out.splitlines()


def lanes(big: bool) -> None:
    """`gpu_lanes.py`: workers of its own, with a small model."""
    short = ["--seconds", "20"] if big else ["--seconds", "3", "--step-ms", "5", "--waiting", "128"]
    print("\n".join(said_by(["bench/gpu_lanes.py", *short], LANES_S)[-5:]))


def tests(left_s: float) -> None:
    """`pytest -m gpu`, as long as there is time."""
    lines = said_by(["-m", "pytest", "-q", "-m", "gpu", "tests/gpu"], max(30.0, left_s))
    said = [x for x in lines if x.startswith(("FAILED", "ERROR", "SKIPPED")) or " in " in x]
    print("\n".join(said[-20:]))


def main() -> None:
    """Print all of it."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["1b", "tiny"], default="1b" if here == "cuda" else "tiny")
    parser.add_argument("--minutes", type=float, default=8.0)
    given = parser.parse_args()
    big, began = given.shape == "1b", time.perf_counter()
    new_tokens, turns, usual = (64, 3, 16) if big else (8, 1, 4)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.environ |= {"AGENTMESH_CACHE": folder, "BENCH_MODEL": "made", "BENCH_NEW_TOKENS": str(new_tokens),
                       "BENCH_MEMORY": "0.3", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        import gpu_prefix
        from gpu_made import made
        from gpu_ways import compared, three_ways

        print(device_line(here))
        model, told = made(given.shape, here, Path(folder))
        print(told, flush=True)
        with part("agent steps", began), three_ways() as ways:
            print(f"{new_tokens} new tokens a step; attention: {ways.engine._batching.attention}")
            compared(ways, 32, turns, usual)
            compared(ways, 128, turns - 1 or 1, 0, first_turn=100)
        with part("a prefix of 1,500 tokens over many agents", began):
            gpu_prefix.compared(model, 64 if big else 4, 1500, vocabulary=model.config.vocab_size)
        with part("attention kernels here", began):
            kernels_tried(model)
        with part("the same requests with each attention", began):
            attentions(model, Asked(32, 512, new_tokens, 1024) if big else Asked(8, 64, new_tokens, 200))
        del model
        if here == "cuda":
            torch.cuda.empty_cache()
        with part("an urgent request under a full low lane", began):
            lanes(big)
        with part("pytest -m gpu", began):
            tests(60 * given.minutes - (time.perf_counter() - began))
    print(f"\nin {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
