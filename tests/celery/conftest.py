"""A real Valkey and a real RabbitMQ for the tests of this folder."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmesh.journal.events import StepDone
from agentmesh.testing import FakeOpenAI, says, uses
from agentmesh.testing.servers import RabbitServer, ValkeyServer, running_server


@pytest.fixture(scope="session")
def _valkey_server() -> Iterator[ValkeyServer]:
    with running_server(ValkeyServer) as server:
        yield server


@pytest.fixture(scope="session")
def _rabbit_server() -> Iterator[RabbitServer]:
    if missing := RabbitServer.missing():
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with running_server(RabbitServer) as server:
        yield server


@pytest.fixture
def valkey(_valkey_server: ValkeyServer) -> ValkeyServer:
    """An empty Valkey: `.url` for redis-py, `.broker_url` for Celery, `.kill()` and `.restart()` for chaos."""
    _valkey_server.flush()
    return _valkey_server


@pytest.fixture
def rabbitmq(_rabbit_server: RabbitServer) -> RabbitServer:
    """A RabbitMQ without queues: `.url` for Celery, `.kill()` and `.restart()` for chaos, `.evaluate()` for its limits."""
    _rabbit_server.flush()
    return _rabbit_server


class Oracle:
    """What runs of survivors.py must come to. Its model is a fake server and its tool writes a file: both count.

    A run of task t asks the model nine times (four workers of two turns, one writer) and looks up t-0 to t-3.
    """

    crew = str(Path(__file__).parent / "survivors.py")

    def __init__(self, log: Path) -> None:
        self.log = log
        log.touch()

    def env(self, server: FakeOpenAI) -> dict[str, str]:
        """What a worker of the crew must be told."""
        return {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k", "SURVIVORS_LOG": str(self.log)}

    @staticmethod
    def answer(body: dict[str, Any]) -> Any:
        """A worker's two turns, and the writer's one."""
        last = body["messages"][-1]
        if last["role"] == "tool":
            return says(f"<{last['content']}>")
        return uses("look_up", word=last["content"]) if body.get("tools") else says(f"page: {last['content']}")

    @staticmethod
    def expected(task: str) -> str:
        """The answer of a run."""
        return "page: " + " | ".join(f"<meaning of {task}-{i}>" for i in range(4))

    @staticmethod
    def asked(server: FakeOpenAI) -> Counter[str]:
        """How often each question came."""
        return Counter(json.dumps(r.body["messages"]) for r in server.requests)

    def asked_again(self, server: FakeOpenAI) -> int:
        """LLM calls beyond one a step."""
        asked = self.asked(server)
        return asked.total() - len(asked)

    def looked_up(self) -> Counter[str]:
        """How often the tool did each word."""
        return Counter(self.log.read_text().split())

    @staticmethod
    def words(*tasks: str) -> Counter[str]:
        """What the tool must have done for these."""
        return Counter(f"{task}-{i}" for task in tasks for i in range(4))

    @staticmethod
    def ends(mesh: Any, *runs: str) -> list[tuple[str, StepDone]]:
        """The ends of all steps of these runs and what is below them, with the run each is in."""
        members = [m for run in runs for m in mesh.get(run).tree()]
        return [(m.run_id, e) for m in members for e in m.events() if isinstance(e, StepDone)]

    def ended_twice(self, mesh: Any, *runs: str) -> list[str]:
        """Steps with more than one end."""
        ends = Counter((m, e.n) for m, e in self.ends(mesh, *runs))
        return [f"{m} step {n}" for (m, n), count in ends.items() if count > 1]


@pytest.fixture
def oracle(tmp_path: Path) -> Oracle:
    """Of one test, with no look-up in its file yet."""
    return Oracle(tmp_path / "log")
