"""LangChain's own fakes and tools through our engine."""

from typing import Annotated, Any

import pytest
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import InjectedToolArg, StructuredTool
from langchain_core.tools import tool as lc_tool
from pydantic import Field

from agentmesh import Agent, Crew, DefinitionError
from agentmesh.langchain import as_model, as_tool, from_langchain, to_langchain
from agentmesh.message import Message, ToolCall, system, user
from agentmesh.testing import FakeMesh, says, uses


@lc_tool
def multiply(a: int, b: int = 2) -> int:
    """Multiplies two numbers."""
    return a * b


class Bound(FakeMessagesListChatModel):
    """LangChain's fake refuses tools; the real ones bind them."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        assert tools[0]["function"]["name"] == "multiply"
        return self


def test_a_chat_model_with_tool_calls() -> None:
    class Calculator(Agent):
        tools = (as_tool(multiply),)
        instructions = "Calculate."

    call: Any = {"name": "multiply", "args": {"a": 21}, "id": "c1", "type": "tool_call"}
    chat = Bound(responses=[AIMessage(content="", tool_calls=[call]), AIMessage(content="it is 42")])
    mesh = FakeMesh(Calculator(), model=as_model(chat))
    run = mesh.start("21 times 2", stream=False)
    assert run.result() == "it is 42"
    assert [m.text for m in run.messages()] == ["21 times 2", "", "42", "it is 42"]


def test_a_chat_model_streams() -> None:
    class Poet(Agent):
        pass

    chat = GenericFakeChatModel(messages=iter([AIMessage(content="the sea at night")]))
    assert FakeMesh(Poet(), model=as_model(chat)).run("x") == "the sea at night"


def test_a_tool_keeps_its_name_description_and_schema() -> None:
    ours = as_tool(multiply, retries=1)
    assert (ours.name, ours.spec.description, ours.retries) == ("multiply", "Multiplies two numbers.", 1)
    assert ours.spec.parameters["required"] == ["a"]

    class Calculator(Agent):
        tools = (ours,)

    mesh = FakeMesh(Calculator(), model=[uses("multiply", a="x"), uses("multiply", a=4, b=3), says("12")])
    run = mesh.start("x")
    assert run.result() == "12"
    assert [m.text for m in run.messages() if m.role == "tool"][1] == "12"


def test_a_tool_keeps_what_its_arguments_say_and_hides_what_is_injected() -> None:
    @lc_tool
    def visit(
        city: Annotated[str, Field(description="where to", min_length=2)], user: Annotated[str, InjectedToolArg] = "me"
    ) -> str:
        """Visits a city."""
        return f"{user} in {city}"

    ours = as_tool(visit)
    assert ours.spec.parameters["properties"] == {"city": {"type": "string", "minLength": 2, "description": "where to"}}

    class Guide(Agent):
        tools = (ours,)

    run = FakeMesh(Guide(), model=[uses("visit", city="L"), uses("visit", city="Lima"), says("bye")]).start("x")
    refusal, answer = [m.text for m in run.messages() if m.role == "tool"]
    assert refusal.startswith("error: city: ")
    assert answer == "me in Lima"


def test_a_tool_with_a_json_schema_is_shown_as_it_is() -> None:
    schema = {"type": "object", "properties": {"unit-of": {"enum": ["C", "F"]}}, "required": ["unit-of"]}

    async def call(**arguments: Any) -> str:
        return f"in {arguments['unit-of']}"

    theirs = StructuredTool(name="weather", description="The weather.", args_schema=schema, coroutine=call)
    ours = as_tool(theirs, timeout_s=5)
    assert (ours.spec.parameters, ours.spec.description, ours.timeout_s) == (schema, "The weather.", 5)

    class Guide(Agent):
        tools = (ours,)

    mesh = FakeMesh(
        Guide(), model=[uses("weather", **{"unit-of": "K"}), uses("weather", **{"unit-of": "C"}), says("hot")]
    )
    refusal, answer = [m.text for m in mesh.start("x").messages() if m.role == "tool"]
    assert refusal == "error: unit-of: 'K' is not one of ['C', 'F']; call weather again"
    assert answer == "in C"


def test_messages_both_ways() -> None:
    ours = [
        system("s"),
        user("u"),
        Message("assistant", "t", (ToolCall("c", "f", '{"a": 1}'),)),
        Message("tool", "r", tool_call_id="c"),
    ]
    assert [from_langchain(m) for m in to_langchain(ours)] == ours


def test_unwrapped_objects_are_refused_with_the_line_to_write() -> None:
    class Plain(Agent):
        pass

    with pytest.raises(DefinitionError, match=r"write `agentmesh.langchain.as_model\(it\)`"):
        Crew(Plain(), model=GenericFakeChatModel(messages=iter([])))
    with pytest.raises(DefinitionError, match=r"write `agentmesh.langchain.as_tool\(it\)`"):

        class Wrong(Agent):
            tools = (multiply,)  # type: ignore[assignment]
