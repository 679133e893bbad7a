"""The fake OpenAI server: honest to the official client, and broken on demand."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmesh.testing import FakeOpenAI, Fault, says, uses

openai = pytest.importorskip("openai", reason="the official client is in the dev extra")

HI: Any = [{"role": "user", "content": "hi"}]
ADD: Any = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


def client_of(server: FakeOpenAI, **options: Any) -> Any:
    return openai.OpenAI(base_url=server.url, api_key="k", **{"max_retries": 0, **options})


def post(url: str, content: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content), timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.loads(e.read())


def test_whole_and_streamed_are_one_answer() -> None:
    reply = says("hello there") & uses("add", a=1) & uses("add", a=2)
    with FakeOpenAI([reply, reply]) as server, client_of(server) as client:
        whole = client.chat.completions.create(model="m", messages=HI)
        with client.chat.completions.stream(model="m", messages=HI, stream_options={"include_usage": True}) as stream:
            streamed = stream.get_final_completion()
    assert whole.model == streamed.model == "m"
    assert whole.choices[0].finish_reason == streamed.choices[0].finish_reason == "tool_calls"
    for answer in (whole, streamed):
        message = answer.choices[0].message
        assert message.content == "hello there"
        assert [json.loads(c.function.arguments) for c in message.tool_calls] == [{"a": 1}, {"a": 2}]
    assert [c.id for c in whole.choices[0].message.tool_calls] == [c.id for c in streamed.choices[0].message.tool_calls]
    assert whole.usage == streamed.usage


def test_a_stream_counts_only_when_asked() -> None:
    with FakeOpenAI(["x"]) as server, client_of(server) as client:
        chunks = list(client.chat.completions.create(model="m", messages=HI, stream=True))
    assert all(c.usage is None for c in chunks)


def test_without_a_script_it_calls_the_first_tool_and_ends() -> None:
    with FakeOpenAI(rounds=2) as server, client_of(server) as client:
        messages, ids = list(HI), []
        for _ in range(2):
            message = client.chat.completions.create(model="m", messages=messages, tools=ADD).choices[0].message
            (call,) = message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
            messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "1"}]
            ids.append(call.id)
        assert client.chat.completions.create(model="m", messages=messages, tools=ADD).choices[0].message.content
    assert len(set(ids)) == 2
    assert [len(r.body["messages"]) for r in server.requests] == [1, 3, 5]


def test_faults_come_once_and_in_order(server: FakeOpenAI) -> None:
    server.fail_next(429, retry_after=7)
    server.fail_next(400, body='{"error":{"message":"odd","code":"odd_code"}}')
    with client_of(server) as client:
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(model="m", messages=HI)
        assert limited.value.response.headers["retry-after"] == "7"
        with pytest.raises(openai.BadRequestError) as odd:
            client.chat.completions.create(model="m", messages=HI)
        assert odd.value.code == "odd_code"
        assert client.chat.completions.create(model="m", messages=HI).choices[0].message.content == "done"


def test_the_official_client_retries_as_it_does_elsewhere(server: FakeOpenAI) -> None:
    server.fail_next(500, retry_after=0.001, times=2)
    with client_of(server, max_retries=2) as client:
        assert client.chat.completions.create(model="m", messages=HI).choices[0].message.content == "done"
    assert len(server.requests) == 3


def test_a_server_that_hangs(server: FakeOpenAI) -> None:
    server.faults.append(Fault(hang=True))
    with client_of(server, timeout=0.05) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="m", messages=HI)
    assert server.in_flight == 1


def test_a_stream_that_drips_and_one_that_is_cut() -> None:
    with FakeOpenAI(lambda body: says("one two three")) as server, client_of(server) as client:
        server.faults.append(Fault(drip_s=0.001))
        chunks = client.chat.completions.create(model="m", messages=HI, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one two three"
        server.faults.append(Fault(cut_after=300))
        with pytest.raises(Exception, match="Connection error|incomplete chunked read|peer closed"):
            list(client.chat.completions.create(model="m", messages=HI, stream=True))


def test_what_is_not_in_the_script_is_a_bad_request() -> None:
    with FakeOpenAI(["one"]) as server, client_of(server) as client:
        client.chat.completions.create(model="m", messages=HI)
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="is not in the script: 'hi'; add a reply for it"):
                client.chat.completions.create(model="m", messages=HI, stream=stream)


def test_a_function_that_fails_is_a_bad_request() -> None:
    def answer(body: Any) -> Any:
        raise AssertionError("not this one")

    refused = pytest.raises(openai.BadRequestError, match="raised AssertionError: not this one")
    with FakeOpenAI(answer) as server, client_of(server) as client, refused:
        client.chat.completions.create(model="m", messages=HI)


def test_other_requests_are_refused(server: FakeOpenAI) -> None:
    chat = f"{server.url}/chat/completions"
    assert post(f"{server.url}/nothing", b"{}")[0] == 404
    assert [post(chat, content)[0] for content in (b"no json", b"[]", b"{}", b'{"messages":[]}')] == [400] * 4
    assert server.requests == []
    with client_of(server) as client:
        assert [m.id for m in client.models.list()] == ["fake"]


def test_as_a_process_with_a_script(tmp_path: Path) -> None:
    script = tmp_path / "replies"
    script.write_text('{"uses": [["add", {"a": 1}], ["add", {"a": 2}]]}\n\n{"says": "three"}\n')
    argv = [sys.executable, "-W", "error", "-m", "agentmesh.testing.fake_openai", "--script", str(script)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            chat = f"{process.stdout.readline().strip()}/chat/completions"
            asked = json.dumps({"model": "m", "messages": HI}).encode()
            (first, second) = (post(chat, asked)[1]["choices"][0]["message"] for _ in range(2))
        finally:
            process.kill()
    assert [c["function"]["arguments"] for c in first["tool_calls"]] == ['{"a": 1}', '{"a": 2}']
    assert second["content"] == "three"
