"""Our own models keep the public contract; and it finds those that break a promise."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage

from agentmesh.definitions.queue import Servers
from agentmesh.langchain import as_model
from agentmesh.message import Message, Usage, assistant
from agentmesh.model import Answer, Model, Prompt
from agentmesh.models.http import HttpModel
from agentmesh.models.load_balancer import LoadBalancer
from agentmesh.testing import FakeOpenAI, Reply, ScriptedModel, says, uses
from agentmesh.testing.contracts import ModelContract, check_model


def reply(tools: bool, has_result: bool) -> Reply:
    return uses("double", number=21) if tools and not has_result else says("hello to you")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    def answer(body: dict[str, Any]) -> Reply:
        return reply(bool(body.get("tools")), body["messages"][-1]["role"] == "tool")

    with FakeOpenAI(answer) as running:
        yield running


class TestScriptedModel(ModelContract):
    def make(self) -> Model:
        return ScriptedModel(lambda p: reply(bool(p.tools), p.messages[-1].role == "tool"))

    def make_failing(self) -> Model:
        return ScriptedModel()


class TestHttpModel(ModelContract):
    @pytest.fixture(autouse=True)
    def address(self, server: FakeOpenAI) -> None:
        self.url = server.url

    def make(self) -> Model:
        return HttpModel("any", base_url=self.url)

    def make_failing(self) -> Model:
        return HttpModel("any", base_url="http://127.0.0.1:9/v1", tries=1)


class TestLoadBalancer(TestHttpModel):
    def make(self) -> Model:
        return LoadBalancer(Servers((self.url,)))

    def make_failing(self) -> Model:
        return LoadBalancer(Servers(("http://127.0.0.1:9/v1",)))


class Hello(Model):
    """Keeps every promise but those that a test takes from it."""

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        if on_token is not None:
            on_token("hello")
        return Answer(assistant("hello"), Usage(1, 1))


def test_a_model_without_tools_keeps_it_too() -> None:
    check_model(lambda: Hello("any"), calls_tools=False)


def broken(**methods: Any) -> Callable[[], Model]:
    return type("Broken", (Hello,), methods)


async def silent(self: Any, prompt: Prompt, on_token: Any = None) -> Answer:
    return Answer(assistant("hello"), Usage(1, 1))


async def uncounted(self: Any, prompt: Prompt, on_token: Any = None) -> Answer:
    return Answer((await Hello.ask(self, prompt, on_token)).message)


async def a_user(self: Any, prompt: Prompt, on_token: Any = None) -> Answer:
    return Answer(Message("user", "hello"), Usage(1, 1))


async def from_a_thread(self: Any, prompt: Prompt, on_token: Any = None) -> Answer:
    if on_token is not None:
        thread = threading.Thread(target=on_token, args=("hello",))
        thread.start()
        thread.join()
    return Answer(assistant("hello"), Usage(1, 1))


async def left_behind(self: Any, prompt: Prompt, on_token: Any = None) -> Answer:
    self.task = asyncio.ensure_future(asyncio.sleep(5))
    await asyncio.sleep(0.005)
    return await Hello.ask(self, prompt, on_token)


async def bound_to_a_loop(self: Any, prompt: Prompt, on_token: Any = None) -> Answer:
    self.loop = getattr(self, "loop", asyncio.get_running_loop())
    assert self.loop is asyncio.get_running_loop()
    return await Hello.ask(self, prompt, on_token)


@pytest.mark.parametrize(
    ("ask", "promise"),
    [
        (silent, "test_on_token_gets_the_text_of_the_answer"),
        (uncounted, "test_usage_is_counted"),
        (a_user, "test_an_answer_is_a_message_of_the_assistant"),
        (from_a_thread, "test_on_token_gets_the_text_of_the_answer"),
        (left_behind, "test_a_cancelled_request_leaves_nothing_open"),
        (bound_to_a_loop, "test_one_object_serves_several_event_loops"),
    ],
)
def test_a_broken_promise_is_found(ask: Any, promise: str) -> None:
    with pytest.raises(AssertionError) as found:
        check_model(broken(ask=ask), calls_tools=False)
    assert found.value.__notes__ == [f"found by ModelContract.{promise}"]


def test_a_failure_of_another_kind_is_found() -> None:
    async def fails(self: Any, prompt: Prompt, on_token: Any = None) -> Answer:
        raise OSError("no network")

    class Fails(ModelContract):
        def make_failing(self) -> Model:
            return broken(ask=fails)()

    with pytest.raises(AssertionError, match="OSError: no network; raise a ModelError or RetryLater"):
        Fails().test_a_failure_is_a_model_error_or_asks_for_a_retry()


def test_a_contract_has_no_other_attributes() -> None:
    with pytest.raises(TypeError, match="ModelContract has no attribute 'calls_tool'"):
        check_model(Hello, calls_tool=False)


def test_a_model_without_ask_cannot_be_made() -> None:
    class Silent(Model):
        pass

    with pytest.raises(TypeError, match="ask"):
        Silent()  # type: ignore[abstract]


class Chat(FakeMessagesListChatModel):
    """LangChain's fake refuses tools; the real ones bind them."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


class TestLangChainModel(ModelContract):
    calls_tools = False
    counts_usage = False  # the fake counts nothing

    def make(self) -> Model:
        return as_model(Chat(responses=[AIMessage(content="hello")]))
