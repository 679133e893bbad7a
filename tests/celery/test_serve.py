"""`agentmesh serve` as the official client meets it: a real process, real workers, a real Valkey, real HTTP."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from agentmesh.celery.loop import drive
from agentmesh.event import RunCancelled, StepDone
from agentmesh.journals.redis import RedisJournal
from agentmesh.message import Usage
from agentmesh.testing import FakeOpenAI, Fault, ValkeyServer, says, uses
from agentmesh.testing.hosts import children
from agentmesh.testing.servers import a_server

CREW = """
from pydantic import BaseModel
from agentmesh import *

class Order(BaseModel):
    number: int

@tool
def look_up(word: str) -> str:
    "Looks a word up."
    return f"meaning of {word}"

@tool(approve=True)
def refund(order: int) -> str:
    "Refunds."
    return f"refunded {order}"

class Desk(Agent):
    "Answers."
    tools = (look_up,)

class Both(Agent):
    "Asks its desk twice."
    def flow(self, task: str, ctx: Context) -> str:
        return " and ".join(ctx.gather([Desk().on(f"{task} {i}") for i in range(2)]))

class Clerk(Agent[Order]):
    def flow(self, task: Order, ctx: Context) -> Order:
        return Order(number=task.number + 1)

class Payer(Agent):
    tools = (refund,)

crew = Crew(Desk(), Both(), Clerk(), Payer(), model="openai:fake")
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
URL = re.compile(r"(http://\S+)/v1 ")
RUN = "x-agentmesh-run"


def answer(body: dict[str, Any]) -> Any:
    """Calls the first tool, then tells what it answered; without tools it shouts the last word back."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return says(f"I found: {last['content']}")
    if body.get("tools"):
        function = body["tools"][0]["function"]
        return uses(
            function["name"], **{name: 7 if name == "order" else "tea" for name in function["parameters"]["properties"]}
        )
    return says(f"you said {last['content'].upper()} to me")


class Served:
    """An `agentmesh serve` process, the model server behind it, and the journal it writes."""

    def __init__(self, folder: Path, valkey: ValkeyServer, model: FakeOpenAI, *args: str, **env: str) -> None:
        self.model = model
        self.journal = RedisJournal(valkey.url, prefix="agentmesh:", push=False)
        (folder / "crew.py").write_text(CREW)
        self.env = {
            **os.environ, "OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "k", "AGENTMESH_BROKER": valkey.broker_url,
            "AGENTMESH_LEASE_S": "3", **env,
        }  # fmt: skip
        argv = [sys.executable, "-m", "agentmesh.cli.main", "serve", "crew.py", "--port", "0", *args]
        self.process = subprocess.Popen(argv, cwd=folder, env=self.env, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = URL.search(line)
        assert found, line + self.process.stderr.read()
        self.line, self.url = line, found[1]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=30)

    def ask(self, text: str = "tea", model: str = "openai:fake", **how: Any) -> Any:
        return self.client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **how)

    def raw(self, body: Any, **headers: str) -> tuple[int, Any]:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", sent, {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)["error"]

    def events(self, run_id: str) -> list[Any]:
        return drive(self.journal.events(run_id))

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=40)
        return self.process.returncode, said

    def close(self) -> None:
        self.client.close()
        drive(self.journal.close())
        if self.process.poll() is None:
            self.stop()


@pytest.fixture(scope="module")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with a_server(ValkeyServer) as valkey, FakeOpenAI(answer) as model:
        it = Served(tmp_path_factory.mktemp("serve"), valkey, model, "--embed", "wordllama")
        yield it
        it.close()


@pytest.fixture
def served(_served: Served) -> Served:
    _served.model.faults.clear()
    _served.model.requests.clear()
    _served.model._latency_s = 0.0
    return _served


def test_a_bare_model_is_a_run_of_one_step(served: Served) -> None:
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


def test_models_are_the_agents_and_the_models_of_the_crew(served: Served) -> None:
    assert [m.id for m in served.client.models.list()] == ["Desk", "Both", "Clerk", "Payer", "openai:fake", "wordllama"]
    assert served.client.models.retrieve("openai:fake").owned_by == "agentmesh"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'Desk'"):
        served.ask(model="Desc")


def test_a_stream_brings_the_same_in_pieces(served: Served) -> None:
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


def test_embeddings(served: Served) -> None:
    texts = ["green tea", "a cup of tea", "the tax office"]
    given = served.client.embeddings.create(model="wordllama", input=texts)  # base64, as the client asks for by itself
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
    with pytest.raises(openai.NotFoundError, match="there are wordllama"):
        served.client.embeddings.create(model="other", input="x")


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_the_clients_to_call(served: Served, stream: bool) -> None:
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


def test_an_agent_is_a_model_too(served: Served) -> None:
    before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    said = served.client.chat.completions.create(model="Desk", messages=[*before, {"role": "user", "content": "tea?"}])
    assert said.choices[0].message.content == "I found: meaning of tea"
    assert [m["content"] for m in served.model.requests[0].body["messages"]] == ["hi", "hello", "tea?"]
    streamed = served.ask(model="Desk", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == "I found: meaning of tea"


def test_usage_is_that_of_the_whole_tree(served: Served) -> None:
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


def test_an_agent_with_types_takes_and_gives_json(served: Served) -> None:
    assert json.loads(served.ask('{"number": 6}', model="Clerk").choices[0].message.content) == {"number": 7}
    with pytest.raises(openai.BadRequestError, match="takes JSON as the last message's text"):
        served.ask("six", model="Clerk")
    with pytest.raises(openai.BadRequestError, match="agent 'Desk' has its own tools; leave out `tools`"):
        served.ask(model="Desk", tools=[TOOL])


def test_many_at_once_on_the_async_client(served: Served) -> None:
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


def test_the_same_key_is_the_same_run(served: Served) -> None:
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


def run_of(served: Served, text: str) -> Any:
    """The newest run that was asked this."""
    runs = drive(served.journal.runs(limit=200))
    return next(r for r in runs if text in json.dumps(served.events(r.id)[0].task))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_run(served: Served, stream: bool, eventually: Any) -> None:
    served.model.faults.append(Fault(hang=True))
    text = f"leave{stream}"
    body = {"model": "openai:fake", "messages": [{"role": "user", "content": text}], "stream": stream}
    headers = {"Content-Type": "application/json", "Idempotency-Key": f"left{stream}"}
    leaves = http.client.HTTPConnection(served.url.removeprefix("http://"))
    leaves.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    eventually(lambda: any(r.body["messages"][-1]["content"] == text for r in served.model.requests))
    left = run_of(served, text)
    leaves.close()
    eventually(lambda: drive(served.journal.head(left.id)).status == "cancelled")
    (end,) = [e for e in served.events(left.id) if isinstance(e, RunCancelled)]
    assert end.by == "its client"
    # the same key again takes it up where it was
    said = served.ask(text, extra_headers={"Idempotency-Key": f"left{stream}"})
    assert said.choices[0].message.content == f"you said {text.upper()} to me"
    assert run_of(served, text).id == f"{left.id}~2"


def test_two_who_wait_for_one_run(served: Served, eventually: Any) -> None:
    served.model._latency_s = 1.0
    got: list[str] = []
    key = {"Idempotency-Key": "two"}
    stays = threading.Thread(
        target=lambda: got.append(served.ask("both", extra_headers=key).choices[0].message.content)
    )
    stays.start()
    eventually(lambda: served.model.requests)
    with pytest.raises(openai.APITimeoutError):
        served.ask("both", timeout=0.3, extra_headers=key)
    stays.join()
    assert got == ["you said BOTH to me"]
    assert len(served.model.requests) == 1


def test_a_retry_after_sent_tokens_ends_the_stream_with_an_error(served: Served) -> None:
    served.model.faults.append(Fault(cut_after=400, drip_s=0.05))
    pieces = []
    with pytest.raises(openai.APIError, match="what was sent is void") as caught:
        for chunk in served.ask(stream=True, extra_headers={"Idempotency-Key": "void"}):
            pieces.append(chunk.choices[0].delta.content or "")
    assert "".join(pieces).startswith("you")
    assert caught.value.code == "retried"
    said = served.ask(extra_headers={"Idempotency-Key": "void"})
    assert said.choices[0].message.content == "you said TEA to me"


def test_a_model_that_refuses(served: Served) -> None:
    served.model.fail_next(400, body='{"error": {"message": "no such tool choice"}}')
    with pytest.raises(openai.InternalServerError, match="no such tool choice") as caught:
        served.ask()
    assert (caught.value.status_code, caught.value.code) == (502, "model_refused")
    assert caught.value.response.headers["x-should-retry"] == "false"
    served.model.fail_next(400, body='{"error": {"message": "context_length_exceeded"}}')
    with pytest.raises(openai.BadRequestError, match="longer than"):
        served.ask(stream=True)


def test_a_run_that_waits_for_a_person(served: Served) -> None:
    with pytest.raises(openai.ConflictError, match=r"waits for somebody: .* step 2 \(refund\): approve") as caught:
        served.ask("pay me", model="Payer")
    assert caught.value.code == "run_waiting"
    assert run_of(served, "pay me").status == "open"


def test_a_killed_worker_is_not_noticed(served: Served, eventually: Any) -> None:
    served.model._latency_s = 0.5
    got: list[str] = []
    asks = threading.Thread(target=lambda: got.append(served.ask("kill").choices[0].message.content))
    asks.start()
    eventually(lambda: served.model.requests)
    for pid in children(served.process.pid).values():
        os.kill(pid, signal.SIGKILL)
    asks.join()
    assert got == ["you said KILL to me"]


def test_what_is_refused_at_the_door(served: Served) -> None:
    good = {"model": "openai:fake", "messages": [{"role": "user", "content": "x"}]}
    assert served.raw(good)[0] == 200
    assert served.raw(good, **{"Content-Type": "text/plain"})[0] == 415  # what a web page may send unasked
    status, error = served.raw(good, Host="evil.example")
    assert (status, error["code"]) == (403, "host_refused")
    assert served.raw(b"{")[1]["message"].startswith("the body is not JSON")
    assert served.raw(b" " * (33 << 20))[0] == 413
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{served.url}/v1/completions", timeout=10)
    with caught.value as error:
        assert "POST /v1/chat/completions" in json.load(error)["error"]["message"]


def test_health_and_the_key(served: Served, tmp_path: Path, valkey: ValkeyServer) -> None:
    other = Served(tmp_path, valkey, served.model, "--key-env", "MESH_KEY", "--processes", "0", MESH_KEY="s3cret")
    try:
        with pytest.raises(openai.AuthenticationError):
            other.client.models.list()
        with other.client.with_options(api_key="s3cret") as client:
            assert client.models.list().data[0].id == "Desk"
        assert "s3cret" not in other.line
        with urllib.request.urlopen(f"{other.url}/health", timeout=10) as response:
            assert json.load(response) == {"ready": True, "workers": {"wanted": 0, "ready": 0}, "journal": True}
    finally:
        other.close()


def test_where_a_key_is_needed(served: Served, tmp_path: Path) -> None:
    (tmp_path / "crew.py").write_text(CREW)
    argv = [sys.executable, "-m", "agentmesh.cli.main", "serve", "crew.py", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(argv, cwd=tmp_path, env=served.env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, "--key-env AGENTMESH_KEY" in done.stderr) == (4, True)


def test_ctrl_c_leaves_runs_resumable(tmp_path: Path, valkey: ValkeyServer, eventually: Any) -> None:
    with FakeOpenAI(answer, latency_s=20) as model:
        it = Served(tmp_path, valkey, model)
        caught: list[openai.APIStatusError] = []

        def ask() -> None:
            try:
                it.ask("later")
            except openai.APIStatusError as e:
                caught.append(e)

        asks = threading.Thread(target=ask)
        asks.start()
        eventually(lambda: model.in_flight == 1)
        code, said = it.stop(signal.SIGINT)
        asks.join()
        assert (code, "runs resume ID" in said) == (130, True)
        assert (caught[0].status_code, caught[0].code) == (503, "server_stops")
        (run_id,) = re.findall(r"run (\w+) goes on", caught[0].message)
        assert drive(it.journal.head(run_id)).status == "open"
        model._latency_s = 0.0
        argv = [sys.executable, "-m", "agentmesh.cli.main", "runs", "resume", run_id]
        done = subprocess.run(argv, cwd=tmp_path, env=it.env, capture_output=True, text=True, timeout=40)
        assert done.stdout == "you said LATER to me\n", done.stderr
        it.close()
