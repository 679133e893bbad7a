"""Agent steps on a local model: through Celery, beside the bare engine on the same prompts, and beside the usual pattern.

    python bench/gpu_batch.py [--steps 32] [--turns 3] [--usual 4]

Every turn has prompts of its own, so that no way finds an earlier turn's in its cache; the ways take turns, and of each
the fastest turn counts. Every answer has the same number of tokens. The usual pattern is a solo worker with the model
loaded, all threads, one task and one `generate` a prompt; it streams nothing.
"""

import argparse
import os

from common import machine


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--usual", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    given = parser.parse_args()
    os.environ["BENCH_NEW_TOKENS"] = str(given.new_tokens)  # read by the crew, here and in its workers
    from gpu_ways import MODEL, compared, three_ways

    with three_ways() as ways:
        print(f"{given.new_tokens} new tokens a step on {MODEL}, {ways.engine._model.device}; {machine()}")
        compared(ways, given.steps, given.turns, given.usual)


if __name__ == "__main__":
    main()
