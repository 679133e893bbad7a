"""The lock of a device: an engine's steps and an encoder's batches, one at a time, and neither waits for long."""

import threading
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentmesh import EmbedderError
from agentmesh.inference import batching, device
from agentmesh.inference.device import DeviceLock, lock_of
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import InferenceRequest
from agentmesh.rag.embedders import encoder as encoders
from agentmesh.rag.embedders.encoder import Encoder
from agentmesh.testing.tiny_models import save_encoder

PROMPT, TOKENS = tuple(range(40, 60)), 300
TEXTS = ["".join(chr(97 + (i * j) % 26) for j in range(4 + i % 50)) for i in range(600)]
BATCHES = 6  # that these texts are, alone


@pytest.fixture(autouse=True)
def _fresh_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_locks", {"cpu": DeviceLock()})  # as on a GPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("bert"))


# ---- the lock alone ------------------------------------------------------------------------------
class Party:
    """Threads that want the lock; who had it, in order."""

    def __init__(self) -> None:
        self.lock, self.had = DeviceLock(), list[str]()
        self.lock.engines.add(self)

    def want(self, kind: str) -> threading.Thread:
        """Comes back when the thread waits in line."""
        waiting = self.waiting

        def work() -> None:
            with self.lock.step() if kind == "step" else self.lock.batch():
                self.had.append(kind)

        thread = threading.Thread(target=work)
        thread.start()
        while self.waiting == waiting:
            time.sleep(0.001)
        return thread

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lock._waiting.values()))


def test_however_many_batches_wait_a_step_goes_after_one() -> None:
    party = Party()
    with party.lock.step():
        threads = [party.want(kind) for kind in ("batch", "batch", "batch", "step", "step")]
    for thread in threads:
        thread.join()
    assert party.had == ["batch", "step", "batch", "step", "batch"]
    assert (party.lock._holder, party.lock.held_s) == (None, 0.0)


def test_whoever_fails_or_is_interrupted_gives_the_turn_on() -> None:
    party = Party()
    for kind in (party.lock.step, party.lock.batch):
        with pytest.raises(ZeroDivisionError), kind():
            1 / 0
    with party.lock.step():
        gate = threading.Lock()
        gate.acquire()
        interrupted = _Interrupted()
        threading_lock, threading.Lock = threading.Lock, lambda: interrupted  # type: ignore[assignment,misc,return-value]
        try:
            with pytest.raises(KeyboardInterrupt), party.lock.batch():
                pass
        finally:
            threading.Lock = threading_lock  # type: ignore[misc]
        assert party.waiting == 0
        thread = party.want("batch")
    thread.join()
    assert party.had == ["batch"]


class _Interrupted:
    """A lock in whose waiting a Ctrl-C falls."""

    def __init__(self) -> None:
        self.taken = False

    def acquire(self) -> bool:
        if self.taken:
            raise KeyboardInterrupt
        self.taken = True
        return True


def test_without_an_engine_batches_go_side_by_side() -> None:
    lock, both = DeviceLock(), threading.Barrier(2, timeout=10)

    def work() -> None:
        with lock.batch():
            both.wait()  # breaks, unless both are inside

    thread = threading.Thread(target=work)
    thread.start()
    work()
    thread.join()
    assert not both.broken


def test_on_a_cpu_nobody_waits_and_each_gpu_has_its_own_turns() -> None:
    device._locks.clear()
    cpu, one, other = map(lock_of, ("cpu", "cuda:0", "cuda:1"))
    cpu.engines.add(one)
    with cpu.step(), one.step(), other.step(), cpu.step(), cpu.batch():
        assert cpu.held_s == 0
    assert cpu.step_s > 0  # batches are as short as steps all the same


def test_how_long_a_step_takes_is_known_while_there_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now = DeviceLock(), 100.0
    monkeypatch.setattr(device.time, "monotonic", lambda: now)
    assert lock.step_s == 0
    with lock.step():
        now += 0.2
        assert lock.held_s == pytest.approx(0.2)
        assert lock.step_s == device.FIRST_S
    assert lock.step_s == pytest.approx(0.2)
    now += 2 * device.RECENT_S
    assert lock.step_s == 0  # the engine has nothing to do
    with lock.step():
        assert lock.step_s == pytest.approx(0.2)


# ---- an engine and an encoder --------------------------------------------------------------------
class Beside:
    """An engine and an encoder on one device; whose forwards there were, in order: `s` and `b`."""

    def __init__(self, engine: InferenceEngine, folder: Path) -> None:
        self.engine, self.encoder, self.order = engine, Encoder(str(folder)), list[str]()
        self.encoder.prepare()
        self.lock = lock_of(str(engine._model.device))
        self.slow_s, self.inside, self.overlaps = 0.0, 0, 0
        self._note(engine._model, "s")
        self._note(self.encoder._loaded()[1], "b")

    def _note(self, model: Any, letter: str) -> None:
        forward = model.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.order.append(letter)
            self.overlaps += self.inside
            self.inside += 1
            try:
                time.sleep(self.slow_s)
                return forward(*args, **kwargs)
            finally:
                self.inside -= 1

        model.forward = noted

    def decode(self, tokens: int = TOKENS) -> tuple[int, ...]:
        return self.engine.submit(InferenceRequest(PROMPT, tokens)).result(60).tokens


@pytest.fixture
def beside(engine: InferenceEngine, folder: Path) -> Beside:
    return Beside(engine, folder)


def test_neither_waits_for_more_than_one_of_the_other_and_both_say_what_they_say_alone(beside: Beside) -> None:
    alone, words = beside.encoder.documents(TEXTS), beside.decode()
    assert (beside.order.count("b"), beside.order.count("s")) == (BATCHES, TOKENS)
    beside.order.clear()
    beside.slow_s = 0.005  # as long as models take: a thread of Python's gets to run only every so often
    said = beside.engine.submit(InferenceRequest(PROMPT, TOKENS))
    while beside.order.count("s") < 5:
        time.sleep(0.001)
    together = beside.encoder.documents(TEXTS)
    assert said.result(60).tokens == words
    assert np.allclose(together, alone, atol=0.02)  # bfloat16, in other batches
    assert (np.einsum("nd,nd->n", together, alone) > 0.999).all()
    assert beside.overlaps == 0
    contended = "".join(beside.order).strip("s")
    assert contended.count("b") >= BATCHES
    assert max(len(list(run)) for letter, run in groupby(contended) if letter == "b") == 1
    steps = [len(list(run)) for letter, run in groupby(contended) if letter == "s"]
    assert np.median(steps) == 1
    assert max(steps) <= 4  # the encoder has its vectors to put away first, on a machine that others use


def test_alone_on_the_device_a_batch_is_as_large_as_it_can_be(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = beside.lock
    beside.encoder._rate = 10_000.0
    sizes = dict[float, int]()
    for step_s in (0.0, 0.001, 0.1, 10.0):
        monkeypatch.setattr(DeviceLock, "step_s", step_s)
        sizes[step_s] = beside.encoder._batch_tokens(lock)
    assert sizes == {0.0: 4096, 0.001: encoders.MIN_BATCH_TOKENS, 0.1: 1000, 10.0: 4096}


def test_an_engine_that_dies_in_a_step_keeps_nobody_waiting(beside: Beside) -> None:
    forward, broken = beside.engine._model.forward, [True]

    def once(*args: Any, **kwargs: Any) -> Any:
        if broken.pop() if broken else False:
            raise RuntimeError("a bad step")
        return forward(*args, **kwargs)

    beside.engine._model.forward = once
    assert len(beside.decode(5)) == 5  # it began again
    assert beside.lock.held_s == 0
    assert beside.encoder.documents(TEXTS).shape == (600, 32)
    beside.engine.close()
    assert not beside.lock.engines


def test_a_batch_that_hangs_is_seen_by_the_engines_watch(beside: Beside) -> None:
    going, over = threading.Event(), threading.Event()
    model = beside.encoder._loaded()[1]
    forward = model.forward

    def hangs(*args: Any, **kwargs: Any) -> Any:
        going.set()
        over.wait(30)
        return forward(*args, **kwargs)

    model.forward = hangs
    thread = threading.Thread(target=beside.encoder.documents, args=(["a"],))
    thread.start()
    going.wait(30)
    first = beside.engine.hung_s  # idle, and its device is not
    said = beside.engine.submit(InferenceRequest(PROMPT, 3))
    while beside.engine.hung_s < first + 0.1:
        time.sleep(0.01)
    assert not said.done()
    over.set()
    thread.join()
    assert len(said.result(30).tokens) == 3
    assert beside.engine.hung_s == 0


def test_no_memory_for_a_batch_is_tried_in_halves_and_fails_only_the_text_that_has_none(beside: Beside) -> None:
    model = beside.encoder._loaded()[1]
    forward, sizes = model.forward, list[int]()

    def narrow(input_ids: Any, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        if input_ids.numel() > 200:
            raise torch.OutOfMemoryError("out of memory")
        return forward(input_ids=input_ids, **kwargs)

    texts = ["".join(chr(97 + i) for i in range(10))] * 100
    alone = beside.encoder.documents(texts)
    model.forward = narrow
    said = beside.engine.submit(InferenceRequest(PROMPT, 50))
    assert np.allclose(beside.encoder.documents(texts), alone, atol=0.02)
    assert sizes[0] > 16 >= min(sizes)
    with pytest.raises(EmbedderError, match=r"not enough memory for a text of 64 tokens .*; cut it shorter"):
        model.forward = lambda **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
        beside.encoder.documents(["word " * 60])
    assert len(said.result(60).tokens) == 50  # the engine does not mind
    assert beside.engine.gauge.deaths == 0


def test_a_broken_device_is_told_to_whoever_can_end_the_process(beside: Beside) -> None:
    told = list[Exception]()
    beside.encoder.prepare(on_fatal=told.append)
    beside.encoder._loaded()[1].forward = lambda **kwargs: (_ for _ in ()).throw(RuntimeError("CUDA error: unknown"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        beside.encoder.documents(["a"])
    assert [str(e) for e in told] == ["CUDA error: unknown"]


def test_an_engine_leaves_the_memory_that_a_batch_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10 * batching.GIB
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * batching.GIB))
    assert batching._share("cuda", 0.85, 0) == 0.85
    assert batching._share("cuda", 0.8, 2 * batching.GIB) == pytest.approx(0.64)  # of 10: 0.8 of the 8 that are left
    with pytest.raises(MemoryError, match=r"10.0 GiB of the GPU are free, and the encoder needs 12.0 GiB of them"):
        batching._share("cuda", 0.85, 12 * batching.GIB)
