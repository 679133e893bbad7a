"""`agentmesh serve` as the official client meets it: a real process, real workers, a real Valkey, real HTTP."""

import asyncio
import json
import time
from typing import Any

import numpy as np
import openai
import pytest

from agentmesh.journal.events import StepDone
from agentmesh.message import Usage
from agentmesh.testing import Fault

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
RUN = "x-agentmesh-run"


def test_a_bare_model_is_a_run_of_one_step(served: Any) -> None:
    raw = served.client.chat.completions.with_raw_response.create(
        model="openai:fake", messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "tea"}],
        temperature=0.5, stop=["x"], max_completion_tokens=20,
    )  # fmt: skip
    said = raw.parse()
    assert said.choices[0].message.content == "you said TEA to me"
    assert (said.choices[0].finish_reason, said.model) == ("stop", "openai:fake")
    (asked,) = served.model.requests
    assert asked.body["messages"][0] == {"role": "system", "content": "be brief"}
    given = {k: asked.body[k] for k in ("model", "temperature", "stop", "max_completion_tokens")}
    assert given == {"model": "fake", "temperature": 0.5, "stop": ["x"], "max_completion_tokens": 20}
    events = served.events(raw.headers[RUN])
    assert [type(e).__name__ for e in events] == ["RunStarted", "StepPlanned", "StepDone", "RunDone"]
    counted = Usage.from_json(events[2].usage)
    assert said.usage is not None
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (counted.input_tokens, counted.output_tokens)
    assert counted.output_tokens > 0


def test_models_are_the_agents_and_the_models_of_the_crew(served: Any) -> None:
    assert [m.id for m in served.client.models.list()] == ["Desk", "Both", "Clerk", "Payer", "openai:fake", "wordllama"]
    assert served.client.models.retrieve("openai:fake").owned_by == "agentmesh"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'Desk'"):
        served.ask(model="Desc")


def test_a_stream_brings_the_same_in_pieces(served: Any) -> None:
    served.model.faults.append(Fault(drip_s=0.2))
    answered, pieces = served.model.answered, []
    for chunk in served.ask(stream=True, stream_options={"include_usage": True}):
        if chunk.choices and chunk.choices[0].delta.content:
            if not pieces:
                assert served.model.answered == answered  # the model is still speaking
            pieces.append(chunk.choices[0].delta.content)
        last = chunk
    assert "".join(pieces) == "you said TEA to me"
    assert len(pieces) > 1
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


def test_embeddings(served: Any) -> None:
    texts = ["green tea", "a cup of tea", "the tax office"]
    given = served.client.embeddings.create(model="wordllama", input=texts)  # base64, which is the client's default
    tea, cup, tax = (np.array(row.embedding, np.float32) for row in given.data)
    assert tea @ cup > tea @ tax
    assert np.linalg.norm(tea) == pytest.approx(1, abs=1e-5)
    plain = served.client.embeddings.create(model="wordllama", input="green tea", encoding_format="float")
    assert np.allclose(plain.data[0].embedding, tea)
    for wrong, sentence in (
        ({"input": [1, 2]}, "tokens are not taken"), ({"input": ["a", ""]}, "is empty"),
        ({"dimensions": 3}, "dimensions is 3 and the vectors have 256"), ({"encoding_format": "int8"}, "'float' or 'base64'"),
        ({"extra_body": {"inputs": 1}}, "Did you mean 'input'"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=sentence):
            served.client.embeddings.create(**{"model": "wordllama", "input": "x", **wrong})
    with pytest.raises(openai.NotFoundError, match="use one of wordllama"):
        served.client.embeddings.create(model="other", input="x")


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_the_clients_to_call(served: Any, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "weather?"}]
    how: Any = {"model": "openai:fake", "messages": messages, "tools": [TOOL], "tool_choice": "auto"}
    if stream:
        with served.client.chat.completions.stream(**how) as events:
            said = events.get_final_completion()
    else:
        said = served.client.chat.completions.create(**how)
    assert said.choices[0].finish_reason == "tool_calls"
    (call,) = said.choices[0].message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "tea"})
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    told = served.client.chat.completions.create(model="openai:fake", messages=messages, tools=[TOOL])
    assert told.choices[0].message.content == "I found: rain"


def test_an_agent_is_a_model_too(served: Any) -> None:
    before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    said = served.client.chat.completions.create(model="Desk", messages=[*before, {"role": "user", "content": "tea?"}])
    assert said.choices[0].message.content == "I found: meaning of tea"
    assert [m["content"] for m in served.model.requests[0].body["messages"]] == ["hi", "hello", "tea?"]
    streamed = served.ask(model="Desk", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == "I found: meaning of tea"


def test_usage_is_that_of_the_whole_tree(served: Any) -> None:
    raw = served.client.chat.completions.with_raw_response.create(
        model="Both", messages=[{"role": "user", "content": "x"}]
    )
    said, run_id = raw.parse(), raw.headers[RUN]
    assert said.choices[0].message.content == "I found: meaning of tea and I found: meaning of tea"
    done = [e for i in (1, 2) for e in served.events(f"{run_id}/{i}") if isinstance(e, StepDone) and e.usage]
    assert len(done) == 4
    assert said.usage is not None
    assert said.usage.total_tokens == sum(Usage.from_json(e.usage).tokens for e in done)
    streamed = "".join(c.choices[0].delta.content or "" for c in served.ask(model="Both", stream=True))
    assert streamed == said.choices[0].message.content


def test_an_agent_with_types_takes_and_gives_json(served: Any) -> None:
    assert json.loads(served.ask('{"number": 6}', model="Clerk").choices[0].message.content) == {"number": 7}
    with pytest.raises(openai.BadRequestError, match="takes JSON as the last message's text"):
        served.ask("six", model="Clerk")
    with pytest.raises(openai.BadRequestError, match="agent 'Desk' has its own tools; leave out `tools`"):
        served.ask(model="Desk", tools=[TOOL])


def test_many_at_once_on_the_async_client(served: Any) -> None:
    served.model._latency_s = 0.5

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        said = await client.chat.completions.create(
            model="openai:fake", messages=[{"role": "user", "content": f"w{i}"}], stream=i % 2 == 0
        )  # fmt: skip
        if isinstance(said, openai.AsyncStream):
            return "".join([c.choices[0].delta.content or "" async for c in said])
        return said.choices[0].message.content or ""

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", timeout=30) as client:
            return await asyncio.gather(*[one(client, i) for i in range(60)])

    began = time.monotonic()
    assert asyncio.run(all_of_them()) == [f"you said W{i} to me" for i in range(60)]
    assert time.monotonic() - began < 15  # one after the other would take 30


def test_the_same_key_is_the_same_run(served: Any) -> None:
    answers = [
        served.client.chat.completions.with_raw_response.create(
            model="openai:fake", messages=[{"role": "user", "content": "tea"}], extra_headers={"Idempotency-Key": "k/1 x"},
            stream=stream,
        )
        for stream in (False, False)
    ]  # fmt: skip
    assert len({a.headers[RUN] for a in answers}) == 1
    assert len(served.model.requests) == 1
    again = served.ask(stream=True, extra_headers={"Idempotency-Key": "k/1 x"})
    assert "".join(c.choices[0].delta.content or "" for c in again) == "you said TEA to me"
    with pytest.raises(openai.UnprocessableEntityError, match="was used for another request"):
        served.ask("coffee", extra_headers={"Idempotency-Key": "k/1 x"})
