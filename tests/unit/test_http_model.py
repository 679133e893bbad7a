"""The HTTP client against the fake server: answers, streams, retries, and a sentence for each refusal."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import openai
import pytest

from agentmesh.errors import ContextTooLong, ModelError, ModelRefused
from agentmesh.message import Message, ToolCall, ToolSpec, system, user
from agentmesh.model import Answer, Prompt, RetryLater
from agentmesh.models.http import HttpModel
from agentmesh.testing import FakeOpenAI, says, uses
from agentmesh.testing.fake_openai import Fault

ADD = ToolSpec("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}})


def with_model(work: Callable[[HttpModel], Coroutine[Any, Any, Any]], server: FakeOpenAI, **options: Any) -> Any:
    async def main() -> Any:
        model = HttpModel(base_url=server.url, **options)
        try:
            return await work(model)
        finally:
            await model.close()

    return asyncio.run(main())


def ask(server: FakeOpenAI, prompt: Prompt | None = None, on_token: Any = None, **options: Any) -> Answer:
    wanted = prompt or Prompt("m", [user("hi")])
    answer: Answer = with_model(lambda model: model.ask(wanted, on_token), server, **options)
    return answer


def test_an_answer_and_what_was_asked() -> None:
    with FakeOpenAI([uses("add", a=1) & uses("add", a=2)]) as server:
        said = Message("assistant", "", (ToolCall("c1", "add", '{"a":1}'),))
        asked = [system("be brief"), user("hi"), said, Message("tool", "3", tool_call_id="c1")]
        answer = ask(server, Prompt("m", asked, [ADD], {"type": "object"}, {"temperature": 0}))
        assert [(c.name, c.arguments) for c in answer.message.tool_calls] == [("add", '{"a": 1}'), ("add", '{"a": 2}')]
        assert answer.finish == "tool_calls"
        assert answer.usage.input_tokens > 0
        body = server.requests[0].body
        assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "tool"]
        assert body["messages"][2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a":1}'}
        assert (body["temperature"], body["tools"][0]["function"]["name"]) == (0, "add")
        assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize("reply", [says("one two three"), uses("add", a=1) & uses("add", b="x")])
def test_a_stream_gives_the_same(reply: Any) -> None:
    with FakeOpenAI([reply, reply]) as server:
        tokens: list[str] = []
        streamed = ask(server, on_token=tokens.append)
        assert streamed == ask(server)
        assert "".join(tokens) == reply.text
        assert server.requests[0].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_tried_again(status: int) -> None:
    with FakeOpenAI(["ok"]) as server:
        server.fail_next(status, retry_after=0, times=2)
        assert ask(server).message.text == "ok"
        assert len(server.requests) == 3


def test_a_long_wait_is_left_to_the_journal() -> None:
    with FakeOpenAI(["ok"]) as server:
        server.fail_next(429, retry_after=60)
        with pytest.raises(RetryLater) as e:
            ask(server)
        assert e.value.after_s == 60
        server.fail_next(503, retry_after=0, times=9)
        with pytest.raises(RetryLater, match=r"answered 503: made to fail with 503 \(3 tries\)"):
            ask(server, tries=3)


@pytest.mark.parametrize(
    ("status", "body", "cls", "said"),
    [
        (401, "", ModelRefused, "refused the key .* check OPENAI_API_KEY"),
        (404, "", ModelRefused, "has no model 'm'"),
        (
            400,
            '{"error":{"message":"This model\'s maximum context length is 8 tokens"}}',
            ContextTooLong,
            "maximum context length is 8",
        ),
        (400, '{"error":{"message":"odd"}}', ModelRefused, r"refused the request \(400\): odd"),
        (429, '{"error":{"message":"pay","code":"insufficient_quota"}}', ModelRefused, "quota is used up: pay"),
    ],
)
def test_refusals_have_their_sentence(status: int, body: str, cls: type[Exception], said: str) -> None:
    with FakeOpenAI() as server:
        server.fail_next(status, body=body)
        with pytest.raises(cls, match=said):
            ask(server)
        assert len(server.requests) == 1


def test_what_is_no_answer() -> None:
    with FakeOpenAI() as server:
        server.faults.append(Fault(malformed=True))
        with pytest.raises(ModelError, match="did not answer with a chat completion: '<html>"):
            ask(server)


def test_nobody_there() -> None:
    async def main() -> None:
        model = HttpModel(base_url="http://127.0.0.1:1/v1", tries=2)
        try:
            await model.ask(Prompt("m", [user("hi")]))
        finally:
            await model.close()

    with pytest.raises(RetryLater, match="no model server responds at http://127.0.0.1:1/v1"):
        asyncio.run(main())


def test_a_stream_that_breaks_off_becomes_a_new_attempt() -> None:
    with FakeOpenAI(lambda body: says("one two three")) as server:
        server.faults.append(Fault(cut_after=400))
        tokens: list[str] = []
        with pytest.raises(RetryLater) as e:
            ask(server, on_token=tokens.append)
        assert e.value.after_s == 0
        assert tokens


def test_the_fake_server_is_one_to_the_official_client() -> None:
    with FakeOpenAI([says("hello there"), says("hello there"), uses("add", a=1)]) as server, openai.OpenAI(
        base_url=server.url, api_key="k"
    ) as client:  # fmt: skip
        asked: Any = [{"role": "user", "content": "hi"}]
        assert client.chat.completions.create(model="m", messages=asked).choices[0].message.content == "hello there"
        chunks = list(client.chat.completions.create(model="m", messages=asked, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello there"
        called = client.chat.completions.create(model="m", messages=asked).choices[0].message.tool_calls
        assert called is not None
        assert called[0].function.arguments == '{"a": 1}'  # type: ignore[union-attr]
        assert [m.id for m in client.models.list()] == ["fake"]
