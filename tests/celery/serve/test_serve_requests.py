"""`agentmesh serve` with unusual requests, clients that leave early, and one of two servers named; all of it real."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import aiohttp
import openai
import pytest

from agentmesh.celery.event_loop import run_sync
from agentmesh.journal.events import RunCancelled
from agentmesh.testing import FakeOpenAI, Fault, ValkeyServer
from agentmesh.testing.servers import running_server

RUN = "x-agentmesh-run"
Eventually = Callable[..., None]


class Two:
    """Two servers of one mesh, the model behind them, and the journal they share; the second has no workers."""

    def __init__(self, one: Any, other: Any) -> None:
        self.urls, self.model, self.journal = [one.url, other.url], one.model, one.journal

    def client(self, i: int, **how: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.urls[i]}/v1", api_key="any", max_retries=0, timeout=40, **how)

    def asked(self, word: str) -> int:
        """How often the model was asked this."""
        return sum(r.body["messages"][-1]["content"] == word for r in self.model.requests)

    def open(self) -> list[str]:
        return [r.id for r in run_sync(self.journal.runs(limit=200)) if r.status == "open"]


@pytest.fixture(scope="module")
def _two(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with running_server(ValkeyServer) as valkey, FakeOpenAI(serve.answer) as model, ExitStack() as stack:
        made = []
        for args in ((), ("--processes", "0")):
            made.append(serve(tmp_path_factory.mktemp("two"), valkey, model, *args, AGENTMESH_DRAIN_S="1"))
            stack.callback(made[-1].close)
        yield Two(*made)


@pytest.fixture
def two(_two: Two) -> Two:
    _two.model.faults.clear()
    _two.model.requests.clear()
    return _two


def asking(word: str, key: str, **how: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": word}]
    return {"model": "openai:fake", "messages": messages, "extra_headers": {"Idempotency-Key": key}, **how}


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_at_another_server_goes_on_when_a_client_leaves(
    two: Two, eventually: Eventually, stream: bool
) -> None:
    two.model.faults.append(Fault(hang=True))  # the first attempt; a caller that stays asks again
    word = f"stays{stream}"
    got: list[str] = []

    def stay() -> None:
        with two.client(1) as client:
            said = client.chat.completions.create(**asking(word, word, stream=stream))
            whole = isinstance(said, openai.types.chat.ChatCompletion)
            got.append(
                said.choices[0].message.content if whole else "".join(c.choices[0].delta.content or "" for c in said)
            )

    def leave() -> None:
        with two.client(0) as client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**asking(word, word), timeout=1.5)

    stays, leaves = threading.Thread(target=stay), threading.Thread(target=leave)
    stays.start()
    eventually(lambda: two.asked(word) == 1)
    leaves.start()
    leaves.join()
    stays.join()
    assert got == [f"you said {word.upper()} to me"]
    with two.client(0) as client:  # and the client that left finds it there
        again = client.chat.completions.with_raw_response.create(**asking(word, word))
    assert again.headers[RUN].endswith("~2")
    assert two.asked(word) == 2


def test_what_a_person_has_cancelled_stays_so(two: Two, eventually: Eventually) -> None:
    two.model.faults.append(Fault(hang=True))
    caught: list[openai.APIStatusError] = []

    def ask() -> None:
        with two.client(1) as client, pytest.raises(openai.ConflictError) as error:
            client.chat.completions.create(**asking("person", "person"))
        caught.append(error.value)

    asks = threading.Thread(target=ask)
    asks.start()
    eventually(lambda: two.asked("person") == 1)
    (run_id,) = two.open()
    run_sync(two.journal.signal(run_id, RunCancelled(by="ana")))
    asks.join()
    assert caught[0].code == "run_cancelled"


def test_clients_that_leave_while_their_streams_begin_leave_no_run_open(two: Two, eventually: Eventually) -> None:
    two.model.faults.extend([Fault(hang=True)] * 60)

    async def leave(session: aiohttp.ClientSession, i: int) -> None:
        body = {"model": "openai:fake", "messages": [{"role": "user", "content": f"l{i}"}], "stream": True}
        timeout = aiohttp.ClientTimeout(total=0.05 + 0.01 * i)
        with pytest.raises(TimeoutError):
            async with session.post(f"{two.urls[0]}/v1/chat/completions", json=body, timeout=timeout) as response:
                await response.read()

    async def storm() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*[leave(session, i) for i in range(60)])

    asyncio.run(storm())
    eventually(lambda: not two.open())
    eventually(lambda: not run_sync(two.journal.counts()).leased)


DESK = json.dumps(
    {"model": "Desk", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}
).encode()
RAW = [
    (b"Host: [::1\r\n", b"{}", 403, "host_refused"),
    (b"Host: localhost\r\n", b'{"model": "openai:fake", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
    (b"Host: localhost\r\n", b'{"model": "openai:fake", "\\udfff": 1}', 400, "invalid_json"),
    (b"Host: localhost\r\n", DESK, 400, "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("host", "body", "status", "code"), RAW)
def test_a_strange_request_is_answered_and_its_connection_stays(
    two: Two, host: bytes, body: bytes, status: int, code: str
) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n"
    port = int(two.urls[0].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link, link.makefile("rb") as answers:
        for _ in range(2):
            link.sendall(head % (host, len(body)) + body)
            assert int(answers.readline().split()[1]) == status
            length = 0
            while (line := answers.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert json.loads(answers.read(length))["error"]["code"] == code
