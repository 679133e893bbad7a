"""Requests that today's applications send: each is honoured, or refused with the name of the parameter; no server."""

import asyncio
import json
from array import array
from typing import Any

import pytest

from agentmesh.message import Message
from agentmesh.model import Prompt
from agentmesh.models.openai_format import request_body
from agentmesh.serve.embeddings import Embeddings
from agentmesh.serve.request import ChatRequest, check_for_local_engine, parse_chat
from agentmesh.serve.request_run import keyed_run
from agentmesh.serve.responses import ApiError

HI = [{"role": "user", "content": "hi"}]
ADD = {"name": "add", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def read(**asked: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "local:m", "messages": HI, **asked}).encode())


def sent(chat: ChatRequest) -> Any:
    """What a model server gets of it."""
    return json.loads(request_body(Prompt("m", chat.messages, chat.tools, chat.output, chat.options), stream=False))


def test_logprobs_may_be_declined() -> None:
    assert read(logprobs=False, top_logprobs=0, stream_options={"include_obfuscation": False}).options == {}


def test_a_schema_and_a_tool_reach_a_server_as_they_were_written() -> None:
    loose = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": False, "description": "d"}}
    chat = read(response_format=loose, tools=[{"type": "function", "function": {**ADD, "strict": True}}])
    assert sent(chat)["response_format"] == loose
    assert sent(chat)["tools"][0]["function"]["strict"] is True
    nameless = read(response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}})
    assert sent(nameless)["response_format"]["json_schema"] == {"name": "answer", "schema": SCHEMA}
    assert "strict" not in sent(read(tools=[{"function": ADD}]))["tools"][0]["function"]


def test_an_agents_output_type_is_strict() -> None:
    prompt = Prompt("m", [Message("user", "x")], (), SCHEMA, {"response_format": {"type": "json_object"}})
    wanted = json.loads(request_body(prompt, stream=False))["response_format"]
    assert wanted == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


def test_what_our_own_engine_takes() -> None:
    asked = read(
        max_completion_tokens=5, temperature=0.5, stop=["x"], presence_penalty=0, repetition_penalty=1.0, logit_bias={},
        parallel_tool_calls=True, response_format={"type": "json_object"},
    )  # fmt: skip
    told = check_for_local_engine(asked)
    assert told.options == {"max_tokens": 5, "temperature": 0.5, "stop": ["x"]}
    assert told.output == {"type": "object"}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    assert check_for_local_engine(read(response_format=wanted)).output == SCHEMA
    assert check_for_local_engine(read()).output is None


@pytest.mark.parametrize(
    "asked",
    [
        {"presence_penalty": 1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 1.2}, {"min_p": 0.1},
        {"logit_bias": {"1": 5}}, {"parallel_tool_calls": False}, {"reasoning_effort": "low"}, {"verbosity": "low"},
    ],
)  # fmt: skip
def test_what_our_own_engine_does_not_do_is_refused_by_name(asked: Any) -> None:
    (name,) = asked
    with pytest.raises(ApiError, match=f"model 'local:m' takes no `{name}`") as caught:
        check_for_local_engine(read(**asked))
    assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize("model", [["m"], {}, 5, None])
def test_an_embedder_has_a_name(model: Any) -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(Embeddings({}).answer(json.dumps({"model": model, "input": "x"}).encode()))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


class Counting:
    """An embedder of this process that remembers what it did."""

    remote, d = False, 2

    def __init__(self) -> None:
        self.done = list[str]()

    def documents(self, texts: list[str]) -> Any:
        self.done += texts
        return [array("f", [1.0, 1.0]) for _ in texts]


def test_what_a_client_no_longer_waits_for_is_not_embedded() -> None:
    async def work() -> list[str]:
        counting = Counting()
        embeddings = Embeddings({"m": counting})  # type: ignore[dict-item]

        def ask(text: str, *, gone: bool) -> Any:
            return embeddings.answer(json.dumps({"model": "m", "input": text}).encode(), is_left=lambda: gone)

        asked = [ask("first", gone=False), ask("left", gone=True), ask("stays", gone=False)]
        _, left, stays = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(left, ConnectionError)
        assert stays["data"][0]["embedding"] == [1.0, 1.0]
        return counting.done

    assert asyncio.run(work()) == ["first", "stays"]


def test_a_key_is_a_run_of_one_crew() -> None:
    assert keyed_run("kitchen", "k") == keyed_run("kitchen", "k")
    assert len({keyed_run("kitchen", "k"), keyed_run("kitchen", "l"), keyed_run("garden", "k")}) == 3
