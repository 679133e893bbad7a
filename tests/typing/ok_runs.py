"""The types of runs on both faces: what was awaited is awaitable, what was not is not."""

from collections.abc import AsyncGenerator, Iterator
from typing import assert_type

from pydantic import BaseModel

from agentmesh import Agent, Mesh, Retriever, Run, aio, run, start
from agentmesh.engine.async_run import AsyncRun
from agentmesh.message import Message
from agentmesh.rag.documents import Hit
from agentmesh.rag.ingest import Added
from agentmesh.testing import FakeMesh


class Verdict(BaseModel):
    good: bool


class Judge(Agent[Verdict]):
    """Text in, a Verdict out."""


def plain(mesh: Mesh, papers: Retriever) -> None:
    assert_type(run(Judge(), "x"), Verdict)
    assert_type(start(Judge(), "x"), Run[Verdict])
    handle = mesh.start(Judge(), "x", run_id="r")
    assert_type(handle, Run[Verdict])
    assert_type(handle.result(timeout_s=1), Verdict)
    assert_type(handle.retry(), Run[Verdict])
    assert_type(handle.messages(), list[Message])
    assert_type(handle.tokens(), Iterator[str])
    assert_type(handle.aio, AsyncRun[Verdict])
    assert_type(mesh.run(Judge(), "x"), Verdict)
    assert_type(papers.sync("folder", size=500), Added)


async def awaited(mesh: Mesh, papers: Retriever) -> None:
    assert_type(await aio.run(Judge(), "x"), Verdict)
    assert_type(await aio.start(Judge(), "x"), AsyncRun[Verdict])
    handle = await mesh.begin(Judge(), "x")
    assert_type(handle, AsyncRun[Verdict])
    assert_type(await handle, Verdict)
    assert_type(await handle.result(), Verdict)
    assert_type(await handle.retry(), AsyncRun[Verdict])
    assert_type(handle.tokens(), AsyncGenerator[str, None])
    assert_type(await mesh.aio.run(Judge(), "x"), Verdict)
    assert_type(await papers.aio.search("q"), list[Hit])
    assert_type(await papers.aio.start_adding("folder", glob="*.md"), AsyncRun[Added])


def of_tests(mesh: FakeMesh) -> None:
    assert_type(mesh.start(Judge(), "x"), Run[Verdict])
    assert_type(mesh.run(Judge(), "x"), Verdict)


async def of_awaited_tests(mesh: FakeMesh) -> None:
    assert_type(await mesh.begin(Judge(), "x"), AsyncRun[Verdict])
    assert_type(await mesh.aio.run(Judge(), "x"), Verdict)
