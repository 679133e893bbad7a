"""Load balancing over several model servers: which one is asked, which is out, and requests that are cut off."""

import asyncio
import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from agentmesh import Agent, Crew, Queue, ServerQueue
from agentmesh.config import Config
from agentmesh.definitions.queue import Servers
from agentmesh.definitions.step import Ask
from agentmesh.errors import ConfigError, DefinitionError, ModelRefused
from agentmesh.message import user
from agentmesh.model import Answer, Prompt, RetryLater
from agentmesh.models import load_balancer
from agentmesh.models.load_balancer import LoadBalancer
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.bootstrap import check_models
from agentmesh.testing import FakeOpenAI, Fault

HI = Prompt("m", [user("hi")])
NOBODY = "http://127.0.0.1:9/v1"


def with_balancer(work: Callable[[LoadBalancer], Coroutine[Any, Any, Any]], *urls: str, key_env: str = "") -> Any:
    async def main() -> Any:
        model = LoadBalancer(Servers(urls, key_env))
        try:
            return await work(model)
        finally:
            await model.close()

    return asyncio.run(main())


async def many(model: LoadBalancer, count: int) -> list[Answer]:
    return list(await asyncio.gather(*[model.ask(HI) for _ in range(count)]))


@contextmanager
def a_process(latency_s: float) -> Iterator[tuple[str, int]]:
    """A fake server that can be killed and stopped: its URL and process id."""
    argv = [sys.executable, "-m", "agentmesh.testing.fake_openai", "--latency", str(latency_s)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.kill()
        process.communicate()


def test_the_one_with_the_least_in_flight() -> None:
    with FakeOpenAI(lambda b: "a", latency_s=0.1) as a, FakeOpenAI(lambda b: "b", latency_s=0.1) as b:
        said = with_balancer(lambda model: many(model, 20), a.url, b.url)
        assert sorted(answer.message.text for answer in said) == ["a"] * 10 + ["b"] * 10


def test_one_that_is_not_there_is_out_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_balancer, "HEALTH_CHECK_S", 0.05)
    with FakeOpenAI(lambda b: "a") as a:
        port = FakeOpenAI()
        with port:
            away = port.url

        async def work(model: LoadBalancer) -> list[str]:
            first = [answer.message.text for answer in await many(model, 6)]
            with FakeOpenAI(lambda b: "b", port=int(away.split(":")[2].split("/")[0])):
                for _ in range(100):
                    first.append((await model.ask(HI)).message.text)
                    if first[-1] == "b":
                        return first
                    await asyncio.sleep(0.02)
            return first

        said = with_balancer(work, a.url, away)
        assert said[:6] == ["a"] * 6
        assert said[-1] == "b"


def test_a_busy_one_passes_the_question_on() -> None:
    with FakeOpenAI(lambda b: "a") as a, FakeOpenAI(lambda b: "b") as b:
        a.fail_next(503, times=1)
        b.fail_next(429, retry_after=3, times=1)
        with pytest.raises(RetryLater) as caught:
            with_balancer(lambda model: model.ask(HI), a.url, b.url)
        assert caught.value.after_s == 3
        a.fail_next(500, times=1)
        assert with_balancer(lambda model: model.ask(HI), a.url, b.url).message.text == "b"
        a.fail_next(400, times=2)
        with pytest.raises(ModelRefused):
            with_balancer(lambda model: model.ask(HI), a.url, b.url)


def test_what_was_cut_off_is_the_journals_to_retry() -> None:
    with FakeOpenAI(lambda b: "a a a a a", latency_s=0.2) as a, a_process(0.2) as (url, pid):

        async def work(model: LoadBalancer) -> list[Any]:
            asked = [asyncio.create_task(model.ask(HI)) for _ in range(6)]
            while len(a.requests) < 3:
                await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            first = await asyncio.gather(*asked, return_exceptions=True)
            return [*first, *await many(model, 3)]

        said = with_balancer(work, a.url, url)
        cut = [e for e in said if isinstance(e, RetryLater)]
        assert [e.after_s for e in cut] == [0.0] * 3
        assert len(said) - len(cut) == 6
        a.faults.append(Fault(cut_after=200))
        tokens: list[str] = []
        with pytest.raises(RetryLater):
            with_balancer(lambda model: model.ask(HI, tokens.append), a.url)
        assert tokens


def test_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_balancer, "HEALTH_CHECK_S", 0.05)
    monkeypatch.setattr(load_balancer, "HEALTH_TIMEOUT_S", 0.1)
    with a_process(0.3) as (url, pid):

        async def work(model: LoadBalancer) -> None:
            asked = asyncio.create_task(model.ask(HI))
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.wait_for(asked, 10)

        with pytest.raises(RetryLater, match="was given up while it worked: no answer in 0.1 s"):
            with_balancer(work, url)


def test_when_none_answers() -> None:
    with pytest.raises(
        RetryLater, match=r"none of 2 model servers responds \(http://127.0.0.1:9/v1: .*start one"
    ) as caught:
        with_balancer(lambda model: model.ask(HI), NOBODY, "http://127.0.0.1:9/w1")
    assert (caught.value.after_s, caught.value.away) == (5, True)


def test_the_doctor_looks_at_them() -> None:
    with FakeOpenAI() as a:
        found = with_balancer(lambda model: model.check_servers(), a.url, NOBODY)
    assert (found[a.url], "Connect" in found[NOBODY]) == ("", True)


def test_their_key_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_error(401)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("OPENAI_API_KEY", "for-openai")
    monkeypatch.setenv("GPU_KEY", "for-gpus")
    try:
        for key_env, name in (("", "the queue's key_env"), ("GPU_KEY", "GPU_KEY")):
            with pytest.raises(ModelRefused, match=f"check {name}"):
                with_balancer(lambda model: model.ask(HI), url, key_env=key_env)
    finally:
        server.shutdown()
        server.server_close()
    assert set(seen) == {None, "Bearer for-gpus"}
    with pytest.raises(ConfigError, match="key_env names NO_KEY, which is not set"):
        LoadBalancer(Servers((url,), "NO_KEY"))


def test_a_queue_in_front_of_servers() -> None:
    class Local(Agent):
        model = "local:big/model"

    class Named(Agent):
        model = "openai:other"
        queue = "gpu"

    class Other(Agent):
        model = "openai:third"

    queue = ServerQueue(
        "gpu", model="big/model", urls=["http://a:1", "http://a:1/v1", "https://b/api/"], concurrency=256
    )
    assert queue.urls == ("http://a:1/v1", "https://b/api")
    crew = Crew(Other(), Local(), Named(), queues=[Queue("main"), queue])
    asked = {a.name: Ask(a.name, a.model, queue=a.queue) for a in crew.agents.values()}
    assert {name: crew.queues.of(step) for name, step in asked.items()} == {
        "Local": "gpu",
        "Named": "gpu",
        "Other": "main",
    }
    assert crew.queues.servers_of(asked["Local"]) == crew.queues.servers_of(asked["Named"]) == queue.servers
    assert crew.queues.servers_of(asked["Other"]) is None
    assert crew.queues.isolates_suspects("gpu")
    assert isinstance(ModelRegistry()(queue.servers)[0], LoadBalancer)
    check_models(Crew(Local(), queues=[queue]), Config())  # no such local model is looked for


def test_the_model_of_the_settings_has_a_queue_too() -> None:
    class Plain(Agent):
        pass

    queue = ServerQueue("gpu", model="big", urls="http://a:1")
    crew, step = Crew(Plain(), queues=[Queue("main"), queue]), Ask("Plain", "")
    assert (crew.queues.of(step), crew.queues.of(step, "local:big")) == ("main", "gpu")
    assert (crew.queues.servers_of(step), crew.queues.servers_of(step, "local:big")) == (None, queue.servers)
    named = Crew(Plain(), model="openai:third", queues=[Queue("main"), queue])
    assert named.queues.of(step, "local:big") == "main"
    check_models(crew, Config(model="local:big"))  # no such local model is looked for


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"urls": "gpu1:8000"}, "'gpu1:8000' in urls is not the URL of a server; write it like"),
        ({"urls": [7]}, "7 in urls is not the URL of a server; write it like"),
        ({"urls": []}, "is not the URL of a server; write it like"),
        ({"urls": "http://a", "pool": "prefork"}, "no parameter `pool`; leave out `pool`, which only Queue has"),
    ],
)
def test_a_wrong_queue(wrong: Any, sentence: str) -> None:
    with pytest.raises(DefinitionError, match=sentence):
        ServerQueue("gpu", **wrong)
