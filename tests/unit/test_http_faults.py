"""The HTTP client under faults: settings, misbehaving servers, broken streams, and keys that must not be shown."""

import asyncio
import email.utils
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from agentmesh.address import OPENAI
from agentmesh.errors import ConfigError, ModelError, ModelRefused
from agentmesh.message import ToolCall, Usage, user
from agentmesh.model import Answer, Prompt, RetryLater
from agentmesh.models.http import HttpModel
from agentmesh.models.openai_format import SseParser, retry_after_s, server_reason
from agentmesh.testing import FakeOpenAI, Fault, says, uses

HI = Prompt("m", [user("hi")])
SSE = "text/event-stream"


def with_model(work: Callable[[HttpModel], Coroutine[Any, Any, Any]], server: FakeOpenAI, **options: Any) -> Any:
    async def main() -> Any:
        model = HttpModel(base_url=server.url, **options)
        try:
            return await work(model)
        finally:
            await model.close()

    return asyncio.run(main())


def ask(server: FakeOpenAI, on_token: Any = None, **options: Any) -> Answer:
    answer: Answer = with_model(lambda model: model.ask(HI, on_token), server, **options)
    return answer


def completion(message: dict[str, Any], **more: Any) -> str:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], **more})


# ---- settings ------------------------------------------------------------------------------------
def test_openai_itself_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for base_url in (None, OPENAI, f"{OPENAI}/", "https://API.openai.com/v2"):
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set; set it"):
            HttpModel(base_url=base_url)
    assert HttpModel(api_key="k").base_url == OPENAI
    assert HttpModel(base_url="http://localhost:8000/v1/").base_url == "http://localhost:8000/v1"


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://here/v1")
    assert HttpModel().base_url == "http://here/v1"
    for wrong in ("localhost:8000/v1", "here", "ftp://here", "http://"):
        monkeypatch.setenv("OPENAI_BASE_URL", wrong)
        with pytest.raises(ConfigError, match="OPENAI_BASE_URL is '.*', which is not a URL"):
            HttpModel()


def test_each_loop_has_a_session_that_ends_with_it() -> None:
    with FakeOpenAI(lambda body: "ok") as server:
        model = HttpModel(base_url=server.url)
        for _ in range(3):  # nobody closes it; the warnings of aiohttp would be errors here
            assert asyncio.run(model.ask(HI)).message.text == "ok"
        assert len(model._sessions) == 1


# ---- odd servers ---------------------------------------------------------------------------------
def test_calls_without_ids_and_with_arguments_that_are_no_text() -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}, {"id": "", "function": {"name": "now"}}]
    with FakeOpenAI() as server:
        server.fail_next(200, body=completion({"content": None, "tool_calls": calls}))
        answer = ask(server)
    assert answer.message.tool_calls == (ToolCall("call_0", "add", '{"a":1}'), ToolCall("call_1", "now", "{}"))
    assert (answer.message.text, answer.usage) == ("", Usage())


def test_a_refusal_is_the_text() -> None:
    with FakeOpenAI() as server:
        server.fail_next(200, body=completion({"content": None, "refusal": "I will not"}))
        assert ask(server).message.text == "I will not"


def test_cached_tokens_are_counted() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    with FakeOpenAI() as server:
        server.fail_next(200, body=completion({"content": "x"}, usage=usage))
        assert ask(server).usage == Usage(9, 2, 4)


def test_a_server_that_does_not_stream() -> None:
    tokens: list[str] = []
    with FakeOpenAI() as server:
        server.fail_next(200, body=completion({"content": "all at once"}))
        assert ask(server, tokens.append).message.text == "all at once"
    assert tokens == ["all at once"]


@pytest.mark.parametrize(
    "body", ["", "[]", "null", "{}", '{"choices":[]}', '{"choices":[{"message":null}]}', "x" * 999]
)
def test_what_is_no_completion_is_shown_in_part(body: str) -> None:
    with FakeOpenAI() as server:
        server.faults.append(Fault(200, body=body or " "))
        with pytest.raises(ModelError, match="did not answer with a chat completion") as e:
            ask(server)
        assert len(server.requests) == 1
        assert len(e.value.message) < 400


def test_a_key_is_never_quoted() -> None:
    said = '{"error":{"message":"Incorrect API key provided: sk-ab***yz and local-secret."}}'
    with FakeOpenAI() as server:
        for status in (401, 403, 400):
            server.fail_next(status, body=said)
            with pytest.raises(ModelRefused) as e:
                ask(server, api_key=" local-secret\n")
            assert "Incorrect API key provided: … and …" in str(e.value)
            assert "secret" not in str(e.value)


# ---- streams -------------------------------------------------------------------------------------
def test_lines_of_megabytes_and_connections_that_are_used_again() -> None:
    big = "y" * 2_000_000

    async def work(model: HttpModel) -> list[str]:
        names = []
        for _ in range(2):
            answer = await model.ask(HI, lambda text: None)
            names.append(answer.message.tool_calls[0].arguments)
        assert len(server._open) == 1
        return names

    with FakeOpenAI(lambda body: uses("write", text=big)) as server:
        assert [json.loads(a)["text"] for a in with_model(work, server)] == [big, big]


@pytest.mark.parametrize("piece", ["no json", "[]", '{"choices":[3]}', '{"error":{"message":"overloaded"}}'])
def test_a_stream_that_goes_wrong_before_a_word_is_tried_again(piece: str) -> None:
    tokens: list[str] = []
    with FakeOpenAI(["ok"]) as server:
        server.faults.append(Fault(200, body=f"data: {piece}\n\n", content_type=SSE))
        assert ask(server, tokens.append).message.text == "ok"
        assert len(server.requests) == 2
    assert tokens == ["ok"]


def test_a_stream_that_goes_wrong_after_a_word_is_retracted() -> None:
    tokens: list[str] = []
    said = 'data: {"choices":[{"delta":{"content":"well"}}]}\n\ndata: {"error":{"message":"overloaded"}}\n\n'
    with FakeOpenAI(["ok"]) as server:
        server.faults.append(Fault(200, body=said, content_type=SSE))
        with pytest.raises(RetryLater, match="broke off its answer: overloaded") as e:
            ask(server, tokens.append)
        assert (e.value.after_s, len(server.requests), tokens) == (0.0, 1, ["well"])


def test_a_stream_that_ends_early_is_not_an_answer() -> None:
    with FakeOpenAI(["ok"]) as server:
        server.faults.append(Fault(200, body='data: {"choices":[{"delta":{}}]}\n\ndata: [DONE]\n\n', content_type=SSE))
        with pytest.raises(RetryLater, match=r"ended in the middle of an answer \(1 try\) within"):
            ask(server, lambda text: None, tries=1)


def test_a_cut_of_calls_alone_is_tried_again() -> None:
    with FakeOpenAI(lambda body: uses("add", a=1)) as server:
        server.faults.append(Fault(cut_after=250))
        assert ask(server, lambda text: None).message.tool_calls[0].arguments == '{"a": 1}'
        assert len(server.requests) == 2


def test_pieces_come_out_however_they_came_in() -> None:
    stream = b': hello\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b": 2}\n\ndata: [DONE]\n\ndata: more\n\n'
    for size in (1, 2, 7, 1000):
        pieces, found = SseParser(), []
        for i in range(0, len(stream), size):
            found += [] if pieces.done else pieces.feed(stream[i : i + size])
        assert (found, pieces.done) == ([b'{"a": 1}', b'{"b": 2}'], True)


# ---- waiting -------------------------------------------------------------------------------------
def test_one_try_is_one_request() -> None:
    with FakeOpenAI(["ok"]) as server:
        server.fail_next(503)
        with pytest.raises(RetryLater, match=r"made to fail with 503 \(1 try\)"):
            ask(server, tries=1)
        assert len(server.requests) == 1


def test_a_server_that_hangs_is_given_up() -> None:
    with FakeOpenAI() as server:
        server.faults.append(Fault(hang=True))
        with pytest.raises(
            RetryLater, match=r"did not end its answer in 0\.05 s \(1 try\) .*; ask for less, or raise timeout_s"
        ):
            ask(server, timeout_s=0.05, tries=1)


def test_a_long_wait_in_the_middle_is_left_to_the_journal() -> None:
    with FakeOpenAI() as server:
        server.fail_next(429, retry_after=0)
        server.fail_next(429, retry_after=email.utils.formatdate(time.time() + 3600, usegmt=True))
        with pytest.raises(RetryLater) as e:
            ask(server)
        assert 3500 < e.value.after_s <= 3600
        assert len(server.requests) == 2


def test_many_at_once_share_the_client() -> None:
    async def work(model: HttpModel) -> list[Answer]:
        return await asyncio.gather(*[model.ask(HI) for _ in range(100)])

    with FakeOpenAI(lambda body: says("ok")) as server:
        assert {a.message.text for a in with_model(work, server, connections=10)} == {"ok"}
        assert len(server.requests) == 100


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None), ("", None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("nan", None), ("inf", None),
        ("1e9", 86_400.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)  # fmt: skip
def test_what_retry_after_may_say(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header) == seconds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"error":{"message":"a"}}', "a"),
        ('{"error":"b"}', "b"),
        ('{"object":"error","message":"c","code":400}', "c"),
        ("d", "d"), ("", "no reason given"), ("[1]", "[1]"), ('{"error":{}}', '{"error":{}}'),
    ],
)  # fmt: skip
def test_what_servers_say(text: str, said: str) -> None:
    assert server_reason(text) == said
