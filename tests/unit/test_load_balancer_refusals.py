"""Servers that are set up wrong: one of them fails no step that another can do."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from agentmesh.definitions.queue import Servers
from agentmesh.errors import ModelError, ModelRefused
from agentmesh.message import user
from agentmesh.model import Prompt, RetryLater
from agentmesh.models.load_balancer import LoadBalancer
from agentmesh.testing import FakeOpenAI, Fault, says

HI = Prompt("m", [user("hi")])
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture
def two() -> Iterator[list[FakeOpenAI]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeOpenAI(lambda body, i=i: says(f"from {i}"))) for i in range(2)]


def asked(count: int, *urls: str) -> list[str]:
    async def main() -> Any:
        model = LoadBalancer(Servers(urls))
        try:
            return [(await model.ask(HI)).message.text for _ in range(count)]
        finally:
            await model.close()

    return list(asyncio.run(main()))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_with_another_model_or_key_fails_no_step(
    two: list[FakeOpenAI], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    two[0].faults.extend([Fault(status)] * 9)
    assert asked(6, *[s.url for s in two]) == ["from 1"] * 6
    said = [record.message for record in caplog.records if two[0].url in record.message]
    assert len(said) == 1  # once, however often it refuses
    assert str(status) in said[0]


def test_a_page_of_something_else_is_no_answer(two: list[FakeOpenAI]) -> None:
    page = "<html>please sign in</html>"
    with FakeOpenAI() as gateway:
        gateway.faults.extend([Fault(200, body=page)] * 9)
        assert asked(4, gateway.url, two[0].url) == ["from 0"] * 4
        with pytest.raises(ModelError, match="did not answer with a chat completion: '<html>"):
            asked(1, gateway.url)


def test_what_every_server_refuses_is_refused(two: list[FakeOpenAI]) -> None:
    for server in two:
        server.faults.append(Fault(404))
    with pytest.raises(ModelRefused, match="has no model 'm'"):
        asked(1, *[s.url for s in two])


def test_a_server_that_is_busy_or_away_may_yet_take_it(two: list[FakeOpenAI]) -> None:
    two[0].faults.append(Fault(404))
    two[1].faults.append(Fault(429, retry_after="7"))
    with pytest.raises(RetryLater) as busy:
        asked(1, *[s.url for s in two])
    assert busy.value.after_s == 7
    two[0].faults.append(Fault(404))
    with pytest.raises(RetryLater, match=f"no model server responds at {NOBODY}"):
        asked(1, NOBODY, two[0].url)


def test_a_wrong_request_is_refused_at_once(two: list[FakeOpenAI]) -> None:
    two[0].faults.append(Fault(400))
    two[1].faults.append(Fault(400))
    with pytest.raises(ModelRefused, match="refused the request"):
        asked(1, *[s.url for s in two])
    assert sum(len(s.requests) for s in two) == 1
