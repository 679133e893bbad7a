"""Run and AsyncRun have the same methods; on a running event loop a plain call names the awaited one."""

import asyncio
import inspect
import typing
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentmesh
from agentmesh import Agent, Approve, Context, Crew, Mesh, MeshError, Retriever, aio, tool
from agentmesh.engine.async_run import AsyncRun
from agentmesh.engine.run import Run
from agentmesh.mesh import AsyncMesh
from agentmesh.retriever import AsyncRetriever
from agentmesh.testing import FakeMesh, says, uses
from agentmesh.testing.fake_mesh import AsyncFakeMesh

PAIRS = [(Run, AsyncRun), (Mesh, AsyncMesh), (FakeMesh, AsyncFakeMesh), (Retriever, AsyncRetriever)]
# What needs no twin: it does no I/O, or it is Celery's, or it is the twin itself.
PLAIN_ALONE = {
    Run: set(),
    Mesh: {"begin", "signature", "s", "map", "worker"},
    FakeMesh: {"begin", "worker"},
    Retriever: {"open", "ingest", "tool"},
}
MIRRORED = {AsyncRun: Run, AsyncMesh: Mesh, AsyncFakeMesh: FakeMesh, AsyncRetriever: Retriever}


def words(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if not name.startswith("_") and callable(value)} | {
        name for name, value in vars(cls).items() if not name.startswith("_") and isinstance(value, classmethod)
    }


@pytest.mark.parametrize(("plain", "awaited"), PAIRS, ids=lambda c: c.__name__)
def test_both_faces_have_the_same_words(plain: type, awaited: type) -> None:
    assert words(plain) - PLAIN_ALONE[plain] == words(awaited) - ({"get"} if plain is Run else set())


@pytest.mark.parametrize(
    ("plain", "awaited", "word"),
    [(plain, awaited, word) for plain, awaited in PAIRS for word in sorted(words(plain) & words(awaited))],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_word_takes_and_gives_the_same_on_both_faces(plain: type, awaited: type, word: str) -> None:
    one, other = getattr(plain, word), getattr(awaited, word)
    assert not inspect.iscoroutinefunction(inspect.unwrap(one))
    assert inspect.signature(one).parameters == inspect.signature(other).parameters
    gives, awaits = typing.get_type_hints(one)["return"], typing.get_type_hints(other)["return"]
    if word in ("get", "where") and plain is not Retriever or word == "where":  # no I/O: plain on both
        assert not inspect.iscoroutinefunction(other)
    elif typing.get_origin(gives) is Iterator:
        assert inspect.isasyncgenfunction(other)
        assert typing.get_origin(awaits) is AsyncGenerator
        assert typing.get_args(awaits)[0] == typing.get_args(gives)[0]
        return
    else:
        assert inspect.iscoroutinefunction(other)
    assert str(gives) == str(_plain(awaits))  # their type variables are two of one name


def _plain(awaited: Any) -> Any:
    """The type of the plain face: AsyncRun[Out] is Run[Out], also in a list."""
    origin, args = typing.get_origin(awaited), typing.get_args(awaited)
    if origin is AsyncRun:
        return Run[args[0]]
    if origin is list:
        return list[_plain(args[0])]  # type: ignore[misc]
    return MIRRORED.get(awaited, awaited)


def test_the_fake_mesh_has_the_whole_face_but_for_celerys_words() -> None:
    assert words(Mesh) - words(FakeMesh) == {"signature", "s", "map"}
    assert words(FakeMesh) <= words(Mesh)
    for word in words(FakeMesh) - {"worker"}:
        of_fake = set(inspect.signature(getattr(FakeMesh, word)).parameters)
        assert of_fake == set(inspect.signature(getattr(Mesh, word)).parameters)


def test_a_mesh_shows_ten_words_besides_celerys_own_and_the_awaited_face() -> None:
    shown = {name for name in vars(Mesh) if not name.startswith("_")}
    assert shown == {"start", "run", "begin", "get", "runs", "signature", "s", "map", "check", "worker", "close"}
    mesh = Mesh(Crew(Echo()), broker="redis://127.0.0.1:9/0")
    assert {name for name in vars(mesh) if not name.startswith("_")} == {"crew", "app", "config", "aio"}


def test_both_modules_have_run_and_start() -> None:
    for word in ("run", "start"):
        one, other = getattr(agentmesh, word), getattr(aio, word)
        assert inspect.signature(one).parameters == inspect.signature(other).parameters


# ---- on a running event loop ----------------------------------------------------------------------
class Echo(Agent):
    """Says something."""


class Payer(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        ctx.do(Approve(f"pay {task}?"))
        return f"paid {task}"


def refusals(path: Path) -> "dict[str, Callable[[], Any]]":
    """Plain calls, by the line that each of them asks for."""
    fake = FakeMesh(Payer())
    run = fake.start("1")
    (item,) = run.waiting_for()
    mesh = Mesh(Crew(Echo()), broker="redis://127.0.0.1:9/0")
    retriever = Retriever.open(path)
    return {
        "await agentmesh.aio.run(…)": lambda: agentmesh.run(Echo(), "x"),
        "await agentmesh.aio.start(…)": lambda: agentmesh.start(Echo(), "x"),
        "await mesh.begin(…)": lambda: mesh.start(Echo(), "x"),
        "await mesh.aio.run(…)": lambda: mesh.run(Echo(), "x"),
        "await mesh.aio.runs()": mesh.runs,
        "await mesh.aio.check()": mesh.check,
        "await mesh.aio.close()": mesh.close,
        "async with mesh.worker()": mesh.worker().__enter__,
        " await mesh.begin(…)": lambda: fake.start("x"),
        " await mesh.aio.run(…)": lambda: fake.run("x"),
        " await mesh.aio.runs(…)": lambda: fake.runs(limit=3),
        "await run.aio.result()": run.result,
        "await run.aio.wait(…)": lambda: run.wait(timeout_s=3),
        "await run.aio.status()": run.status,
        "await run.aio.messages()": run.messages,
        "await run.aio.waiting_for()": run.waiting_for,
        "await run.aio.approve(…)": lambda: run.approve(item, by="ana"),
        "await run.aio.retry()": run.retry,
        "async for … in run.aio.tokens()": run.tokens,
        "async for … in run.aio.follow()": run.follow,
        "await retriever.aio.search(…)": lambda: retriever.search("x"),
        "await retriever.aio.add(…)": lambda: retriever.add(path),
        "await retriever.aio.count()": retriever.count,
    }


def test_a_plain_call_on_a_running_loop_says_what_to_await(tmp_path: Path) -> None:
    calls = refusals(tmp_path)

    async def call_all() -> dict[str, str]:
        hints = {}
        for line, call in calls.items():
            with pytest.raises(MeshError, match="would block the event loop that runs in this thread") as caught:
                call()
            hints[line] = caught.value.hint
        return hints

    hints = asyncio.run(call_all())
    assert hints == {line: f"write `{line.strip()}`" for line in calls}


def test_every_word_that_waits_refuses_there(tmp_path: Path) -> None:
    run = FakeMesh(Echo(), model=[says("hi")]).start("x")
    retriever = Retriever.open(tmp_path)

    async def call_all() -> None:
        for owner, awaited in ((run, AsyncRun), (retriever, AsyncRetriever)):
            for word in sorted(words(awaited) - {"where"}):
                count = sum(
                    p.default is p.empty and p.kind is not p.VAR_KEYWORD
                    for p in inspect.signature(getattr(owner, word)).parameters.values()
                )
                with pytest.raises(MeshError, match=r"would block the event loop"):
                    getattr(owner, word)(*[None] * count)

    asyncio.run(call_all())


def test_the_awaited_face_works_on_a_running_loop() -> None:
    async def program() -> list[Any]:
        mesh = FakeMesh(Crew(Payer(), Echo()), model=lambda p: says(p.messages[-1].text.upper()))
        run = await mesh.begin(Payer(), "7")
        (item,) = await run.waiting_for()
        await run.approve(item, by="ana")
        said = await mesh.begin(Echo(), "a b")
        return [
            await run, await run.status(), await mesh.aio.run(Echo(), "hi"), [t async for t in said.tokens()],
            [type(e).__name__ async for _, e in run.follow()], sorted(h.id for h in await mesh.aio.runs()),
            await mesh.aio.get(run.run_id).result(), [m.run_id for m in await run.tree()],
        ]  # fmt: skip

    events = ["RunStarted", "StepPlanned", "Approved", "RunDone"]
    assert asyncio.run(program()) == ["paid 7", "done", "HI", ["A", " B"], events, ["r1", "r2", "r3"], "paid 7", ["r1"]]


def test_streams_of_a_plain_run_come_to_an_end() -> None:
    run = FakeMesh(Echo(), model=[says("one two three")]).start("x")
    assert list(run.tokens()) == ["one", " two", " three"]
    assert [t.text for t in run.live()] == ["one", " two", " three"]
    waiting = FakeMesh(Payer()).start("1")
    assert (list(waiting.tokens()), waiting.wait(timeout_s=0), waiting.status()) == ([], False, "open")
    assert [type(e).__name__ for _, e in waiting.follow()] == ["RunStarted", "StepPlanned"]


def test_a_plain_call_in_an_async_tool_or_a_flow_is_refused_too(tmp_path: Path) -> None:
    retriever = Retriever.open(tmp_path)

    @tool
    async def look(question: str) -> str:
        """Looks."""
        return str(retriever.search(question))

    class Desk(Agent):
        tools = (look,)

    class Hasty(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return str(retriever.count())

    mesh = FakeMesh(Desk(), model=[uses("look", question="x"), says("no")])
    with pytest.raises(MeshError, match=r"write `await retriever\.aio\.search\(…\)`"):
        mesh.run("x")
    with pytest.raises(MeshError, match="inside the flow of `Hasty` would run again at each replay") as caught:
        FakeMesh(Hasty()).run("x")
    assert "call it in a tool" in str(caught.value)


def test_a_retriever_is_awaited(tmp_path: Path) -> None:
    async def program() -> Any:
        retriever = Retriever.open(tmp_path / "store").aio
        return await retriever.search("x"), await retriever.count(), dict(await retriever.where(year=1).sources())

    assert asyncio.run(program()) == ([], 0, {})


def test_an_async_tool_does_not_wait_for_a_run_either() -> None:
    @tool
    async def nested(question: str) -> str:
        """Waits."""
        return str(await other.aio.run(Echo(), question))

    class Desk(Agent):
        tools = (nested,)

    other = FakeMesh(Echo(), model=[says("never")])
    with pytest.raises(MeshError, match=r"`run\(\)` inside tool `nested` would block a worker while it waits"):
        FakeMesh(Desk(), model=[uses("nested", question="x"), says("no")]).run("x")
