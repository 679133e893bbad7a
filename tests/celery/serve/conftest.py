"""An `agentmesh serve` process: real workers, a real Valkey, a fake model server behind it."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from agentmesh.celery.event_loop import run_sync
from agentmesh.journal.redis import RedisJournal
from agentmesh.testing import FakeOpenAI, ValkeyServer, says, uses
from agentmesh.testing.servers import running_server

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
URL = re.compile(r"(http://\S+)/v1 ")


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

    crew = CREW
    answer = staticmethod(answer)

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
        return run_sync(self.journal.events(run_id))

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=40)
        return self.process.returncode, said

    def close(self) -> None:
        self.client.close()
        run_sync(self.journal.close())
        if self.process.poll() is None:
            self.stop()


@pytest.fixture(scope="module")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running_server(ValkeyServer) as valkey, FakeOpenAI(answer) as model:
        it = Served(tmp_path_factory.mktemp("serve"), valkey, model, "--embed", "wordllama")
        yield it
        it.close()


@pytest.fixture
def served(_served: Served) -> Served:
    """One for each file of tests; nothing is left in its model server."""
    _served.model.faults.clear()
    _served.model.requests.clear()
    _served.model._latency_s = 0.0
    return _served


@pytest.fixture(scope="session")
def serve() -> type[Served]:
    """`serve(folder, valkey, model, "--key-env", "KEY")` starts another one, which is to be closed."""
    return Served
