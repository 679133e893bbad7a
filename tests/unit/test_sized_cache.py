"""A cache bounded in bytes; and a worker whose runs have large values stays small, with nothing lost by an eviction."""

import asyncio
import gc
import random
import sys
import threading
import tracemalloc
from typing import Any

import pytest

from agentmesh import tool
from agentmesh.definitions.agent import Agent
from agentmesh.definitions.context import Context
from agentmesh.definitions.step import Approve
from agentmesh.engine.history_cache import HISTORY_CACHE_BYTES, HistoryCache
from agentmesh.journal.events import StepDone
from agentmesh.message import Message
from agentmesh.models.openai_format import message_text
from agentmesh.sized_cache import MIB, CacheStats, SizedCache, cache_stats
from agentmesh.testing import FakeMesh

VALUE_BYTES = 1_000_000


def cache_of(max_bytes: int) -> SizedCache[str, str]:
    return SizedCache("test", max_bytes, lambda key, value: len(value))


def test_the_least_recently_used_leaves_first() -> None:
    cache = cache_of(10)
    for key in "abc":
        cache.put(key, "xxx")
    assert cache.get("a") == "xxx"
    cache.put("d", "xxx")
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert cache.stats() == CacheStats(bytes=9, entries=3, hits=4, misses=1, evictions=1)


def test_a_value_put_again_is_weighed_anew() -> None:
    cache = cache_of(10)
    cache.put("a", "xxxx")
    cache.put("b", "xxxx")
    cache.put("a", "xxxxxxxx")
    assert (cache.bytes, len(cache), cache.get("b")) == (8, 1, None)
    assert cache.pop("a") == "xxxxxxxx"
    assert cache.pop("a") is None
    assert (cache.bytes, len(cache)) == (0, 0)


def test_the_newest_stays_however_large_it_is() -> None:
    cache = cache_of(10)
    cache.put("a", "x")
    cache.put("b", "x" * 100)
    assert (cache.get("a"), cache.get("b")) == (None, "x" * 100)
    cache.put("c", "x")
    assert cache.get("b") is None
    assert cache.bytes == 1


@pytest.mark.parametrize("seed", range(20))
def test_it_holds_its_bound_at_random(seed: int) -> None:
    rng = random.Random(seed)
    cache = cache_of(50)
    for _ in range(500):
        key = rng.choice("abcdefgh")
        if rng.random() < 0.5:
            cache.put(key, "x" * rng.randint(0, 40))
        elif rng.random() < 0.8:
            cache.get(key)
        else:
            cache.pop(key)
        sizes = {k: len(v) for k, v in cache._values.items()}
        assert cache.bytes == sum(sizes.values())
        assert cache._sizes == sizes
        assert cache.bytes <= 50 or len(sizes) == 1


def test_threads_leave_it_whole() -> None:
    cache = cache_of(100)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(5_000):
                key = str(rng.randint(0, 30))
                if cache.get(key) is None:
                    cache.put(key, "x" * rng.randint(1, 20))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert errors == []
    assert cache.bytes == sum(len(v) for v in cache._values.values()) <= 100


def test_caches_of_one_name_are_counted_together() -> None:
    one, two = (SizedCache[str, str]("twins", 10, lambda key, value: 1) for _ in range(2))
    one.put("a", "")
    two.put("a", "")
    two.get("a")
    assert cache_stats()["twins"] == CacheStats(bytes=2, entries=2, hits=1)
    del one, two
    gc.collect()
    assert "twins" not in cache_stats()


# ---- what is held by it ------------------------------------------------------------------------
def test_rendered_messages_and_parsed_calls_are_bounded_in_bytes() -> None:
    for i in range(40):
        message_text(Message("user", f"{i}" + "x" * VALUE_BYTES))
        say.call_from_json(f'{{"text": "{i}{"x" * VALUE_BYTES}"}}')
    for name in ("message_texts", "parsed_calls"):
        held = cache_stats()[name]
        assert 1 <= held.entries < 40
        assert held.bytes <= 16 * MIB
    message_text(Message("user", "hi"))
    hits = cache_stats()["message_texts"].hits
    assert message_text(Message("user", "hi")) == '{"role":"user","content":"hi"}'
    assert cache_stats()["message_texts"].hits == hits + 1


@tool
def say(text: str) -> str:
    """Says it."""
    return text


@tool
def big(number: int) -> str:
    """A large value."""
    return f"{number}" + "x" * VALUE_BYTES


class Waits(Agent[str]):
    """Has a large value, and then waits for a person."""

    def flow(self, task: str, ctx: Context) -> str:
        value = ctx.do(big.on(int(task)))
        ctx.do(Approve("go on?"))
        return value[:1]


class Chain(Agent[int]):
    """Steps one after the other, some side by side."""

    def flow(self, task: str, ctx: Context) -> int:
        total = 0
        for i in range(4):
            total += len(ctx.do(big.on(i)))
            total += sum(len(v) for v in ctx.gather([say.on(f"{task} {i} {j}") for j in range(3)]))
        return total


def engine_of(mesh: FakeMesh, max_bytes: int) -> HistoryCache:
    cache = HistoryCache(max_bytes)
    mesh.runner.engines[0]._history_cache = cache
    return cache


def test_a_thousand_runs_of_large_values_leave_a_worker_small() -> None:
    """The journal here is this process's memory too: what it keeps is taken off."""
    mesh = FakeMesh(Waits())
    cache = engine_of(mesh, HISTORY_CACHE_BYTES)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for i in range(1_000):
            mesh.start(str(i), run_id=f"w{i}")
            lines = mesh.runner.journal.tables.lists[f"ev:w{i}"]
            lines[:] = [line if len(line) < VALUE_BYTES else f"{i}" for line in lines]
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert cache._runs.evictions > 900
    assert len(cache._runs) > 20
    assert held < 2 * HISTORY_CACHE_BYTES


def test_a_weight_is_that_of_the_memory() -> None:
    """Within a factor of two, for small events as for large ones."""
    for value, runs in (("x", 2_000), ("x" * 100_000, 200)):
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            cache = HistoryCache(10_000 * MIB)
            mesh = FakeMesh(Steps())
            mesh.runner.engines[0]._history_cache = cache
            for i in range(runs // 20):
                mesh.start([value, i], run_id=f"s{i}")
            mesh.runner.journal.tables.lists.clear()
            mesh.runner.journal.tables.hashes.clear()
            gc.collect()
            held = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert 0.5 < cache._runs.bytes / held < 2, (len(value), cache._runs.bytes, held)


class Steps(Agent[str]):
    """Twenty steps, and then it waits for a person."""

    def flow(self, task: list[Any], ctx: Context) -> str:
        for i in range(20):
            ctx.do(echo.on(f"{task[1]} {i} {task[0]}"))
        ctx.do(Approve("go on?"))
        return ""


@tool
def echo(text: str) -> str:
    """The text."""
    return text + "."


@pytest.mark.parametrize("max_bytes", [1, 5_000, 3_000_000])
def test_an_eviction_costs_a_read_and_nothing_else(max_bytes: int) -> None:
    """Many runs at once over a cache that holds none, few, or some of them."""
    mesh = FakeMesh(Chain(), workers=2)
    caches = []
    for engine in mesh.runner.engines:
        cache = engine._history_cache = HistoryCache(max_bytes)
        caches.append(cache)
    mesh.runner.paused = True
    runs = [mesh.start(f"{i}", run_id=f"c{i}") for i in range(6)]
    mesh.runner.paused = False
    asyncio.run(mesh.runner.run_until_idle())
    assert [run.result(timeout_s=0) for run in runs] == [4 * (VALUE_BYTES + 1) + 12 * 5] * 6
    for run in runs:
        done = [e.n for e in run.events() if isinstance(e, StepDone)]
        assert sorted(done) == list(range(1, 17))  # each once
    assert sum(cache._runs.evictions for cache in caches) > 0
