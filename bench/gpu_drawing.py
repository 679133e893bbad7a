"""What drawing costs a step: a batch of scores of a large vocabulary, each row by its own seed, beside transformers' own way.

    python bench/gpu_drawing.py [--rows 32] [--vocabulary 49152]

Milliseconds of a step, median of ten. transformers' own way is its logits warpers for the whole batch and a multinomial draw,
with one generator for all: what a request gets depends on who else is in the batch.
"""

import argparse
import time
from collections.abc import Callable

import torch
from common import machine, median
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from agentmesh.inference.sampling import DrawOptions, draw


def took_ms(what: Callable[[], torch.Tensor]) -> float:
    """Median of ten, after two that are not counted."""
    taken = []
    for _ in range(12):
        began = time.perf_counter()
        what().tolist()  # on a device: until it is here
        taken.append(1e3 * (time.perf_counter() - began))
    return median(taken[2:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = torch.randn(given.rows, given.vocabulary, device=device) * 3
    print(f"{given.rows} rows of {given.vocabulary}, {device}; {machine()}")
    print(f"{'the likeliest':<24} {took_ms(lambda: scores.argmax(1)):7.2f} ms")
    none = torch.zeros((given.rows, 0), dtype=torch.int64, device=device)
    for name, top_k, top_p in (("temperature", 0, 1.0), ("top_k 50", 50, 1.0), ("top_p 0.9", 0, 0.9)):
        wishes = [DrawOptions(0.8, top_k, top_p, i, 0) for i in range(given.rows)]
        warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
        warpers += [TopKLogitsWarper(top_k)] if top_k else [TopPLogitsWarper(top_p)] if top_p < 1 else []

        def theirs(warpers: LogitsProcessorList = warpers) -> torch.Tensor:
            return torch.multinomial(warpers(none, scores).softmax(1), 1)[:, 0]

        ours_ms, theirs_ms = took_ms(lambda wishes=wishes: draw(scores, wishes)), took_ms(theirs)  # type: ignore[misc]
        print(f"{name:<24} {ours_ms:7.2f} ms   transformers' own way {theirs_ms:7.2f} ms   x {ours_ms / theirs_ms:.2f}")


if __name__ == "__main__":
    main()
