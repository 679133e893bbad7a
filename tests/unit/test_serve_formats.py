"""The JSON that the endpoint reads and writes, and its authentication; no server."""

import asyncio
import json
from typing import Any

import pytest

from agentmesh import Agent, Crew
from agentmesh.definitions.crew import models_of
from agentmesh.definitions.passthrough import ModelRequest, Passthrough
from agentmesh.errors import ConfigError, NameTaken, RunFailedError, ServiceDown
from agentmesh.journal.events import StepDone
from agentmesh.message import Message, ToolCall, Usage
from agentmesh.model import Answer
from agentmesh.serve.auth import AuthMiddleware, is_loopback, key_from
from agentmesh.serve.request import parse_chat
from agentmesh.serve.responses import ApiError, ChatResponse, RunOutcome, api_error_of
from agentmesh.testing import FakeMesh, ScriptedModel, says, uses

HI = [{"role": "user", "content": "hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def read(**body: Any) -> Any:
    return parse_chat(json.dumps({"model": "m", "messages": HI, **body}).encode())


def test_a_request_in_our_words() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ana"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]  # fmt: skip
    got = read(
        messages=messages, tools=[ADD], temperature=0, stop="x", user="ana", n=1, seed=None, stream=True,
        stream_options={"include_usage": True}, tool_choice={"type": "function", "function": {"name": "add"}},
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    )  # fmt: skip
    assert got.messages == [
        Message("system", "be brief"), Message("user", "ab"), Message("assistant", "", (ToolCall("c1", "add", "{}"),)),
        Message("tool", "3", tool_call_id="c1"),
    ]  # fmt: skip
    assert got.tools[0].name == "add"
    assert got.output == {"type": "object"}
    choice = {"type": "function", "function": {"name": "add"}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    assert got.options == {"temperature": 0.0, "stop": "x", "tool_choice": choice, "response_format": wanted}
    assert (got.stream, got.usage_in_stream) == (True, True)
    assert read(response_format={"type": "json_object"}).options == {"response_format": {"type": "json_object"}}


WRONG = [
    (b"[1]", "a JSON list; it must be an object"),
    (b'{"model": NaN}', "the body is not JSON: expected value at line 1"),
    ({"model": ""}, "names no model"),
    ({"temprature": 1}, "no parameter 'temprature' here. Did you mean 'temperature'?"),
    ({"temperature": 3}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 2}, "n is 2; each request gets one answer"),
    ({"logprobs": True}, "logprobs are not given"),
    ({"stream": "yes"}, "stream is 'yes'; it must be true or false"),
    ({"messages": []}, "at least one message"),
    ({"messages": ["x"]}, "messages[0] has role None"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "has role 'robot'; it must be one of system"),
    ({"messages": [{"role": "user"}]}, "messages[0] has no `content`"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of type 'image_url'; only text"),
    ({"messages": [{"role": "user", "content": 7}]}, "content of type 'int'; only text"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "no `tool_call_id`"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "a tool call without a `function`"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}]}, "is not text"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0] must be a function with a name"),
    ({"tools": {}}, "`tools` must be a list"),
    ({"tool_choice": "any"}, "tool_choice is 'any'"),
    ({"tool_choice": "required"}, "there are no `tools`"),
    ({"tools": [ADD], "tool_choice": {"function": {"name": "sub"}}}, "names the function 'sub'"),
    ({"response_format": {"type": "xml"}}, "must have type 'text'"),
    ({"response_format": {"type": "json_schema"}}, "without `json_schema.schema`"),
    ({"stream_options": 1}, "`stream_options` must be an object"),
    (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not JSON"),
    (b'{"model": "m", "x": ' + b"[" * 999 + b"]" * 999 + b"}", "the body is not JSON: recursion limit"),
    (b'{"model": "m", "logit_bias": {"1": 1e999}, "messages": []}', "logit_bias"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "`tool_calls` of type 'int'; it must be a list"),
    ({"top_logprobs": 2}, "logprobs are not given"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stream_options": {"includ_usage": True}}, "Did you mean 'include_usage'"),
    ({"tools": [{"function": {**ADD["function"], "strict": "yes"}}]}, "`strict` is 'yes'"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice has type 'allowed_tools'"),
]


@pytest.mark.parametrize(("body", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_each_mistake_has_its_sentence(body: Any, sentence: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(body) if isinstance(body, bytes) else read(**body)
    assert caught.value.status == 400
    assert sentence in caught.value.message


def test_an_answer_in_their_words() -> None:
    head = ChatResponse("r1", "m", 5)
    calls = (ToolCall("c1", "add", "{}"), ToolCall("c2", "sub", "{}"))
    whole = head.whole(RunOutcome("", calls, Usage(9, 3, 6)))
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert whole["choices"][0]["message"]["content"] is None
    assert whole["usage"] == {
        "prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 6},
    }  # fmt: skip
    assert head.whole(RunOutcome("cut", (), Usage(), cut=True))["choices"][0]["finish_reason"] == "length"
    thought = json.loads(head.piece("thought", "hm")[6:])
    assert thought["choices"][0]["delta"] == {"reasoning_content": "hm"}
    first, last = (json.loads(c[6:]) for c in head.ends(RunOutcome("", calls, Usage()), with_usage=False))
    assert [c["index"] for c in first["choices"][0]["delta"]["tool_calls"]] == [0, 1]
    assert last["choices"][0]["finish_reason"] == "tool_calls"


def test_errors_and_whether_to_ask_again() -> None:
    late = api_error_of(RunFailedError("late", cause="StepTimeout"))
    assert (late.status, late.headers) == (504, {"x-should-retry": "false"})
    away = api_error_of(ServiceDown("away"))
    assert (away.status, away.headers, away.to_json()["error"]["type"]) == (
        503,
        {"x-should-retry": "true"},
        "server_error",
    )


def test_a_question_is_one_ask_as_it_was_put() -> None:
    class Cut(ScriptedModel):
        async def ask(self, prompt: Any, on_token: Any = None) -> Answer:
            answer = await super().ask(prompt, on_token)
            return Answer(answer.message, answer.usage, "length")

    class Someone(Agent):
        """Somebody else."""

    model = Cut([uses("add") & says("well")])
    mesh = FakeMesh(Crew(Someone()), model=model)
    question = ModelRequest(model="openai:x", messages=(Message("user", "1+2"),), options={"seed": 1})
    run = mesh.start(Passthrough(), question)
    assert run.result() == "well"
    assert model.prompts[0].messages == (Message("user", "1+2"),)
    assert model.prompts[0].options == {"seed": 1}
    (done,) = [e for e in run.events() if isinstance(e, StepDone)]
    assert (done.finish, done.value["tool_calls"][0][1]) == ("length", "add")
    with pytest.raises(NameTaken, match="which is reserved"):
        Crew(Passthrough())


def test_whom_the_guard_lets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(key: str, path: str = "/v1/models", **headers: str) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
        asyncio.run(AuthMiddleware(inside, key)(scope, None, send))  # type: ignore[arg-type]
        return int(sent[0]["status"])

    assert status("k", authorization="Bearer k") == 200
    assert status("k", authorization="bearer  k ") == 200
    assert [status("k", authorization=a) for a in ("Bearer K", "Basic k", "Bearer", "k", "Bearer é")] == [401] * 5
    assert status("k", host="127.0.0.1") == 401
    assert status("k", "/health") == 200
    assert [status("", host=h) for h in ("localhost:8000", "127.0.0.1:1", "[::1]:80")] == [200] * 3
    assert [status("", host=h) for h in ("evil.example", "127.0.0.1.evil.example", "")] == [403] * 3
    monkeypatch.setenv("EMPTY", " ")
    with pytest.raises(ConfigError, match="EMPTY, which is not set"):
        key_from("EMPTY", "127.0.0.1")
    with pytest.raises(ConfigError, match="--key-env"):
        key_from("", "example.org")
    assert key_from("", "::1") == ""
    assert not is_loopback("0.0.0.0")


def test_the_models_of_a_crew() -> None:
    class Plain(Agent):
        """Asks the crew's model."""

    class Own(Agent):
        model = "openai:own"

    assert models_of(Crew(Plain(), Own()), "local:d") == ["openai:own", "local:d"]
    assert models_of(Crew(Plain(), Own(), model="openai:c"), "local:d") == ["openai:c", "openai:own"]
    assert models_of(Crew(Plain(), model=ScriptedModel()), "local:d") == []
