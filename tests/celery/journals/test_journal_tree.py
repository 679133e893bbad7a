"""A run's tree read at once: as the pure functions say, in few exchanges, never for long, and nothing missed."""

import asyncio
import contextlib
import heapq
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentmesh import Agent, tool
from agentmesh.definitions.context import Context
from agentmesh.journal import redis_tree, tree
from agentmesh.journal.events import Event, StepDone, StepPlanned, event_from_json
from agentmesh.journal.memory import MemoryJournal
from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.transaction import Tables
from agentmesh.journal.tree_follower import TreeFollower, tree_events
from agentmesh.testing import FakeMesh
from agentmesh.testing.oracle import random_program
from agentmesh.testing.simulation import Faults, World

PREFIX = "diff:"


def fill(client: Any, tables: Tables) -> None:
    """The journal of the tables, as far as a reader of trees looks at it."""
    client.flushdb()
    pipe = client.pipeline()
    for key, lines in tables.lists.items():
        if lines:
            pipe.rpush(PREFIX + key, *lines)
    for key, fields in tables.hashes.items():
        if key.startswith("st:") and fields:
            pipe.hset(PREFIX + key, mapping={k: json.dumps(v) if isinstance(v, dict) else v for k, v in fields.items()})
    pipe.execute()


def read_entries(url: str, run: str) -> Any:
    async def read() -> Any:
        journal = RedisJournal(url, prefix=PREFIX)
        try:
            moving, waiting = await redis_tree.read_open_entries(journal._evaluate, run)
            return moving, await redis_tree.fill_missing_plans(waiting, journal._lines)
        finally:
            await journal.close()

    return asyncio.run(read())


def read_events(url: str, known: dict[str, int]) -> dict[str, list[str]]:
    async def read() -> dict[str, list[str]]:
        journal, lines = RedisJournal(url, prefix=PREFIX), dict[str, list[str]]()
        try:
            async for found in redis_tree.read_new_events(journal._evaluate, known):
                for run, some in found:
                    lines.setdefault(run, []).extend(some)
            return lines
        finally:
            await journal.close()

    return asyncio.run(read())


class Stopped(World):
    """A world that is left where it is after so many verbs."""

    verbs = 0

    def verb(self, name: str, **args: Any) -> tuple[dict[str, Any], list[str]]:
        self.verbs -= 1
        if self.verbs < 0:
            raise StopIteration
        return super().verb(name, **args)


@pytest.mark.parametrize("slices", ["default", "small"])
def test_the_scripts_read_what_the_pure_functions_read(valkey: Any, alike: Any, slices: str, monkeypatch: Any) -> None:
    if slices == "small":  # several calls for each answer
        for name in ("RECORDS_PER_CALL", "LINES_PER_CALL", "BYTES_PER_CALL", "RUNS_PER_CALL"):
            monkeypatch.setattr(redis_tree, name, 3)
        monkeypatch.setattr(redis_tree, "SEARCHED_LINES", 1)
    waits = 0
    for seed in range(6000, 6150):
        rng = random.Random(seed)
        world = Stopped(seed, Faults())
        world.verbs = rng.randint(2, 40)
        with contextlib.suppress(StopIteration):
            world.run()
        tables = world.tables
        fill(alike.client, tables)
        runs = [key.removeprefix("run:") for key in tables.hashes if key.startswith("run:")]
        for run in runs:
            expected = tree.open_entries(tables, run)
            assert read_entries(valkey.url, run) == expected, (seed, run)
            waits += len(expected[1])
        known = {run: rng.randint(0, 12) for run in rng.sample(runs, len(runs))}
        assert read_events(valkey.url, known) == dict(tree.new_events(tables, known)), seed
    assert waits > 10


# ---- a large tree ------------------------------------------------------------------------------
WIDE = 10_000


@pytest.fixture(scope="module")
def wide() -> Tables:
    """A root with 10,000 sub-agents: a tenth waits for a person, half have ended, the rest work."""
    tables = Tables()
    for n in range(1, WIDE + 1):
        child = f"r/{n}"
        planned = f'1 {{"e":"StepPlanned","n":{n},"kind":"Delegate","name":"B"}}'
        tables.lists["ev:r"].append(planned)
        tables.lists[f"ev:{child}"] = ['1 {"e":"RunStarted","crew":"c","agent":"B"}']
        if n % 2:
            tables.hashes["st:r"][str(n)] = "E1"
            tables.lists[f"ev:{child}"].append('2 {"e":"RunDone","value":1}')
            continue
        tables.hashes["st:r"][str(n)] = {"kind": "Delegate", "st": "child", "g": 1, "f": 0, "a": 0}
        step = f'2 {{"e":"StepPlanned","n":1,"kind":"Call","name":"pay","detail":{{"n":{n}}}}}'
        tables.lists[f"ev:{child}"].append(step)
        waits = n % 10 == 0
        record: dict[str, Any] = {"kind": "Call", "st": "held" if waits else "leased", "g": 0, "f": 0, "a": 0}
        tables.hashes[f"st:{child}"]["1"] = record | ({"why": "approve"} if waits else {})
    tables.lists["ev:r"].insert(0, '1 {"e":"RunStarted","crew":"c","agent":"A"}')
    return tables


def work_of(client: Any, read: Callable[[], Any]) -> tuple[int, float, float]:
    """Of a read: calls of scripts, commands inside each of them, and how long each blocked the server in ms."""
    read()  # the scripts are known to the server from now on
    client.config_resetstat()
    read()
    stats = {name.removeprefix("cmdstat_"): stats for name, stats in client.info("commandstats").items()}
    assert set(stats) - {"config|resetstat", "client|setinfo", "hello", "info"} <= {
        "evalsha",
        "hscan",
        "llen",
        "lrange",
    }
    calls = stats["evalsha"]["calls"]
    inside = sum(stats[name]["calls"] for name in ("hscan", "llen", "lrange") if name in stats)
    return calls, inside / calls, stats["evalsha"]["usec_per_call"] / 1000


def part_of(wide: Tables, runs: int) -> Tables:
    part = Tables()
    for n in range(1, runs + 1):
        for key in (f"ev:r/{n}", f"st:r/{n}"):
            part.lists[key], part.hashes[key] = wide.lists[key], wide.hashes[key]
        part.hashes["st:r"][str(n)] = wide.hashes["st:r"][str(n)]
    part.lists["ev:r"] = wide.lists["ev:r"][: runs + 1]
    return part


def test_exchanges_grow_with_slices_and_not_with_runs(alike: Any, valkey: Any, wide: Tables) -> None:
    """100 runs are one exchange, 1,000 two or three; of 10,000 none blocks the server for long."""
    for runs, most_calls in ((100, 1), (1_000, 4), (WIDE, 40)):
        fill(alike.client, part_of(wide, runs))
        polled = {f"r/{n}": 2 for n in range(1, runs + 1)}
        for read in (lambda: read_entries(valkey.url, "r"), lambda: read_events(valkey.url, polled)):
            looks = [work_of(alike.client, read) for _ in range(3)]
            calls, inside, _ = looks[0]
            assert calls <= most_calls, runs
            assert inside <= 4_000, runs
            assert min(blocked_ms for *_, blocked_ms in looks) < 25, looks  # one to five; the machine is shared


def test_a_tree_of_ten_thousand_runs_is_read_whole(valkey: Any, alike: Any, wide: Tables) -> None:
    fill(alike.client, wide)
    moving, waiting = read_entries(valkey.url, "r")
    assert (moving, len(waiting)) == (WIDE * 4 // 10, WIDE // 10)
    assert all('"name":"pay"' in line for *_, line in waiting)
    events = read_events(valkey.url, {"r": 0} | {f"r/{n}": 0 for n in range(1, WIDE + 1)})
    assert sum(map(len, events.values())) == WIDE + 1 + 2 * WIDE


# ---- following one -----------------------------------------------------------------------------
def test_a_step_planned_long_ago_is_found_too(valkey: Any, alike: Any) -> None:
    tables = Tables()
    lines = tables.lists["ev:r"]
    lines += ['1 {"e":"RunStarted","crew":"c","agent":"A"}', '1 {"e":"StepPlanned","n":1,"kind":"Call","name":"old"}']
    for n in range(2, 3_000):
        lines += [f'1 {{"e":"StepPlanned","n":{n},"kind":"Call","name":"f"}}', f'1 {{"e":"StepDone","n":{n}}}']
        tables.hashes["st:r"][str(n)] = f"E{n}"
    tables.hashes["st:r"]["1"] = {"kind": "Call", "st": "held", "why": "in_doubt", "g": 1, "f": 0, "a": 0}
    fill(alike.client, tables)

    async def read() -> Any:
        journal = RedisJournal(valkey.url, prefix=PREFIX)
        try:
            return await journal.open_entries("r")
        finally:
            await journal.close()

    (entry,) = asyncio.run(read()).waiting
    assert (entry.key, entry.why, entry.name) == ("1", "in_doubt", "old")
    assert tree.open_entries(tables, "r") == (0, [("r", "1", "in_doubt", lines[1])])


# What the events of a world leave out.
SPARSE = {"n": 0, "crew": "c", "agent": "A", "kind": "Call", "name": "f", "error": {}, "limits": {}, "action": ""}


class Growing(MemoryJournal):
    """A journal into which a world writes between two reads."""

    def __init__(self, world: World, rng: random.Random) -> None:
        super().__init__()
        self.tables, self.rng, self.parts = world.tables, rng, world.parts  # type: ignore[attr-defined]

    async def new_events(self, known: Any) -> Any:
        for asked in known.items():
            for run, lines in tree.new_events(self.tables, dict([asked])):
                yield run, [event_from_json(SPARSE | json.loads(line.partition(" ")[2])) for line in lines]
            if self.rng.random() < 0.5:
                next(self.parts, None)


class Parts(World):
    """A world that is run piece by piece."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts: Iterator[None] = self._pieces()

    def _pieces(self) -> Iterator[None]:
        for i in range(2):
            self._programs[f"r{i}"] = random_program(self.rng)
            self._begin(f"r{i}")
        self.at(400, self._sweep)
        while self._agenda and not self._over():
            self.now, _, what = heapq.heappop(self._agenda)
            what()
            yield


@pytest.mark.parametrize("seed", range(40))
def test_a_follower_misses_nothing_while_the_tree_grows(seed: int) -> None:
    """Every event of every run once and in order, whatever is written between two reads."""
    rng = random.Random(seed)
    world = Parts(seed, Faults())
    journal = Growing(world, rng)

    async def follow() -> dict[str, list[Event]]:
        got: dict[str, list[Event]] = {}
        follower = TreeFollower(journal, "r0")
        while not follower.ended:
            async for run, event in follower.new_events():
                got.setdefault(run, []).append(event)
            if next(world.parts, "over") == "over":
                break
        world.parts = journal.parts = iter(())  # nothing is written any more
        async for run, event in follower.new_events():
            got.setdefault(run, []).append(event)
        return got

    for _ in range(rng.randint(1, 30)):
        next(world.parts, None)
    got = asyncio.run(follow())
    assert set(got) == world.tables.sets["tree:r0"]
    for run, events in got.items():
        kinds = [_kind(line) for line in world.tables.lists[f"ev:{run}"]]
        end = next((i + 1 for i, kind in enumerate(kinds) if kind in ("RunDone", "RunCancelled")), len(kinds))
        assert [e.to_json()["e"] for e in events][:end] == kinds[:end], run


def _kind(line: str) -> str:
    kind: str = json.loads(line.partition(" ")[2])["e"]
    return kind


def test_all_events_of_a_tree_are_those_of_its_runs() -> None:
    @tool
    def one(number: int) -> int:
        """One more."""
        return number + 1

    class Leaf(Agent[int]):
        """A leaf."""

        def flow(self, task: str, ctx: Context) -> int:
            return ctx.do(one.on(int(task)))

    class Top(Agent[int]):
        """A tree."""

        team = (Leaf(),)

        def flow(self, task: str, ctx: Context) -> int:
            return sum(ctx.gather([Leaf().on(str(i)) for i in range(3)])) + ctx.do(Leaf().on("9"))

    mesh = FakeMesh(Top())
    run = mesh.start("x")
    assert run.result() == 16
    got = asyncio.run(tree_events(mesh.runner.journal, run.run_id))
    runs = asyncio.run(mesh.runner.journal.tree(run.run_id))
    assert sorted({r for r, _ in got}) == sorted(runs)
    for member in runs:
        assert [e for r, e in got if r == member] == asyncio.run(mesh.runner.journal.events(member))
    assert isinstance(got[1][1], StepPlanned)
    assert sum(isinstance(e, StepDone) for _, e in got) == 8
