"""An engine and an encoder on one device: each alone, in turns as on a GPU, and at once as on a CPU.

    python bench/gpu_embed.py [--answers 8] [--seconds 6] [--rounds 2]

So many answers of SmolLM2 are always being computed, and an encoder of MiniLM's shape (random weights by seed) embeds
chunks of about 128 tokens without a pause; beside the engine its batches are as long as a step. "At once" is two threads
that do not wait for each other. Each way runs for so many seconds a round, in alternating order. A gap is the time between
two tokens of one answer.
"""

import argparse
import random
import tempfile
import threading
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import machine
from rag_ingest import SIZE, make_encoder

from agentmesh.inference.device import DeviceLock, lock_of
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import InferenceRequest
from agentmesh.models.local import LocalModel
from agentmesh.rag.embedders.encoder import Encoder

PROMPT_TOKENS, NEW_TOKENS = 64, 400
WAYS = {  # answers, chunks, turns
    "answers alone": (True, False, True),
    "chunks alone": (False, True, True),
    "in turns": (True, True, True),
    "at once": (True, True, False),
}


@dataclass
class Found:
    """What one way did a second."""

    tokens: float
    chunks: float
    p50_ms: float
    p99_ms: float
    batch: float
    cpus: float


class Counted(Encoder):
    """An encoder that counts its texts."""

    rows = batches = 0

    def _forward(self, model: Any, tokens: list[list[int]], pad: int) -> Any:
        vectors = super()._forward(model, tokens, pad)
        self.rows += len(tokens)
        self.batches += 1
        return vectors


class Answers:
    """So many requests in the engine, another one whenever one has ended."""

    def __init__(self, engine: InferenceEngine, many: int) -> None:
        self._engine, self._rng, self._over = engine, random.Random(0), False
        self.gaps_s: list[float] = []
        self._flying: list[Any] = []
        for _ in range(many):
            self._ask()

    def _ask(self) -> None:
        last: list[float] = []

        def hear(tokens: object) -> bool:
            now = time.perf_counter()
            if last:
                self.gaps_s.append(now - last[-1])
            last.append(now)
            return False

        tokens = tuple(self._rng.choices(range(100, 40_000), k=PROMPT_TOKENS))
        future = self._engine.submit(InferenceRequest(tokens, NEW_TOKENS), hear)
        self._flying.append(future)
        future.add_done_callback(lambda _: None if self._over else self._ask())

    def stop(self) -> None:
        """Cancel what flies."""
        self._over = True
        for future in self._flying:
            future.cancel()
        while not self._engine.gauge.idle:
            time.sleep(0.01)


def measured(
    engine: InferenceEngine, encoder: Counted, texts: list[str], way: str, answers: int, seconds: float
) -> Found:
    """One way, once."""
    decode, embed, turns = WAYS[way]
    over = threading.Event()

    def chunks() -> None:
        at = 0
        while not over.is_set():
            encoder.documents(texts[at : at + 128])
            at = (at + 128) % len(texts)

    thread = threading.Thread(target=chunks)
    lock_of(str(engine._model.device)).shared = not turns
    flying = Answers(engine, answers if decode else 0)
    if embed:
        thread.start()
    time.sleep(1.0)  # under way
    flying.gaps_s.clear()
    began, spent = time.perf_counter(), time.process_time()
    tokens, rows, batches = engine.gauge.new_tokens, encoder.rows, encoder.batches
    time.sleep(seconds)
    took, spent = time.perf_counter() - began, time.process_time() - spent
    gaps = sorted(flying.gaps_s) or [0.0]
    tokens, rows, batches = engine.gauge.new_tokens - tokens, encoder.rows - rows, encoder.batches - batches
    over.set()
    flying.stop()
    if embed:
        thread.join()
    middle, worst = (1e3 * gaps[int(len(gaps) * q)] for q in (0.5, 0.99))
    return Found(tokens / took, rows / took, middle, worst, rows / max(1, batches), spent / took)


def one_turn_us() -> float:
    """What a turn costs where nobody else wants it."""
    turn, many = DeviceLock(), 20_000
    began = time.perf_counter()
    for _ in range(many):
        with turn.step():
            pass
    return 1e6 * (time.perf_counter() - began) / many


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="bench-embed-") as folder:
        words = make_encoder(Path(folder), rng)
        encoder = Counted(folder)
        encoder.prepare()
        texts = [" ".join(rng.choices(words, k=SIZE // 5)) for _ in range(1024)]
        engine = LocalModel("smollm2").prepare()
        print(f"{given.answers} answers, {engine._model.device} ({engine._model.dtype}); a turn that nobody else wants costs "
              f"{one_turn_us():.1f} us; {machine()}", flush=True)  # fmt: skip
        found: dict[str, list[Found]] = {way: [] for way in WAYS}
        for n in range(given.rounds):
            for way in list(WAYS)[:: -1 if n % 2 else 1]:
                found[way].append(measured(engine, encoder, texts, way, given.answers, given.seconds))
        engine.close()
    means = {way: Found(*np.mean([astuple(one) for one in ones], axis=0)) for way, ones in found.items()}
    answers, chunks = means["answers alone"], means["chunks alone"]
    for way, m in means.items():
        parts = m.tokens / answers.tokens, m.chunks / chunks.chunks
        work = (parts[0] * answers.cpus + parts[1] * chunks.cpus) / m.cpus
        rounds = " ".join(f"{one.tokens:.0f}/{one.chunks:.0f}" for one in found[way])
        print(f"{way:<13} {m.tokens:6.1f} tokens/s {parts[0]:4.0%} · {m.chunks:5.1f} chunks/s {parts[1]:4.0%} · gaps p50 {m.p50_ms:4.0f} "
              f"p99 {m.p99_ms:4.0f} ms · {m.batch:4.1f} chunks a batch · {m.cpus:.2f} CPUs, each does {work:.2f} of what it does "
              f"alone · rounds {rounds}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
