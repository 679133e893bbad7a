"""Tools that a JSON Schema describes: as a model sees them, in a flow, through the journal; and what is refused."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel

from agentmesh import Agent, Context, RunFailedError, Tool, ToolContext, ToolSignatureError
from agentmesh.journal.events import StepDone, StepPlanned
from agentmesh.testing import FakeMesh, says, uses

CITY = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "forecast",
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2, "description": "its name in English"},
        "days": {"type": "integer", "minimum": 1, "default": 1},
        "unit-of": {"$ref": "#/$defs/unit"},
        "at": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "items": False},
    },
    "required": ["city"],
    "$defs": {"unit": {"enum": ["C", "F"]}},
}


class Sky(BaseModel):
    city: str
    days: int


async def forecast(**arguments: Any) -> Sky:
    return Sky(city=arguments["city"], days=arguments.get("days", 0))


def made(call: Any = forecast, schema: Any = CITY, **options: Any) -> Tool[..., Any]:
    tool: Tool[..., Any] = Tool.from_schema("forecast", schema, call, description="The weather.", **options)
    return tool


def test_a_model_is_shown_the_schema_as_it_is() -> None:
    tool = made(retries=2, timeout_s=5)
    assert tool.spec.parameters == CITY
    assert (tool.spec.name, tool.spec.description, tool.retries, tool.timeout_s) == ("forecast", "The weather.", 2, 5)


def test_a_flow_gets_the_type_that_the_function_is_annotated_with() -> None:
    tool = made()

    class Desk(Agent[Sky]):
        def flow(self, task: str, ctx: Context) -> Sky:
            value = ctx.do(tool.on(city=task, days=3))
            assert type(value) is Sky
            return value

    run = FakeMesh(Desk()).start("Lima")
    assert run.result() == Sky(city="Lima", days=3)
    planned, done = [e for e in run.events() if isinstance(e, StepPlanned | StepDone)]
    assert isinstance(planned, StepPlanned)
    assert planned.name == "forecast"
    assert isinstance(done, StepDone)
    assert done.value == {"city": "Lima", "days": 3}


def test_a_model_is_told_what_does_not_fit_and_calls_again() -> None:
    class Desk(Agent):
        tools = (made(),)

    wrong = uses("forecast", city="L", days="two", at=[1, 2, 3], **{"unit-of": "K"})
    mesh = FakeMesh(Desk(), model=[wrong, uses("forecast", city="Lima", **{"unit-of": "C"}), says("clear")])
    run = mesh.start("x")
    assert run.result() == "clear"
    refusal, answer = [m.text for m in run.messages() if m.role == "tool"]
    at, city, days, unit = refusal.split("; ", 3)
    assert at.startswith("error: at: ")
    assert city.startswith("city: ")
    assert days == "days: 'two' is not of type 'integer'"
    assert unit == "unit-of: 'K' is not one of ['C', 'F']; call forecast again"
    assert answer == '{"city":"Lima","days":0}'


def test_a_plain_function_may_name_its_arguments_and_ask_for_the_context() -> None:
    def price(item: str, context: ToolContext, count: int = 1) -> float:
        return 2.5 * count * context.attempt

    schema = {"type": "object", "properties": {"item": {"type": "string"}, "count": {"type": "integer"}}}
    tool: Tool[..., float] = Tool.from_schema("price", schema, price)

    class Desk(Agent[float]):
        def flow(self, task: str, ctx: Context) -> float:
            return ctx.do(tool.on(item=task, count=2))

    assert FakeMesh(Desk()).run("tea") == 5.0
    with pytest.raises(ToolSignatureError, match="tool `price`: color: there is no such argument"):
        tool.on(item="tea", color="red")


@pytest.mark.parametrize(
    "call", [lambda **a: sorted(a), type("Client", (), {"__call__": lambda self, **a: sorted(a)})()]
)
def test_anything_that_can_be_called_will_do(call: Any) -> None:
    tool = made(call)

    class Desk(Agent[list[str]]):
        tools = (tool,)

        def flow(self, task: str, ctx: Context) -> list[str]:
            return ctx.do(tool.on(city=task, days=1))  # type: ignore[no-any-return]

    assert FakeMesh(Desk()).run("Lima") == ["city", "days"]


def test_the_arguments_are_the_tools_own() -> None:
    def change(at: list[int]) -> int:
        at.append(1)
        return len(at)

    schema = {"type": "object", "properties": {"at": {"type": "array"}}}
    tool = made(change, schema)
    step = tool.on(at=[])
    for _ in range(2):
        assert tool.bind(step.arguments, ToolContext())() == 1


@pytest.mark.parametrize(
    ("schema", "call", "sentence"),
    [
        ({"type": "string"}, forecast, 'its JSON Schema is not that of an object; give it "type": "object"'),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, forecast, "not valid at [$].properties.a.type"),
        (CITY, lambda city: city, "its function has no parameter 'at'; add it, or take `[*][*]arguments`"),
        ({"type": "object", "x": object()}, forecast, "is not JSON"),
        ('{"type": "object"}', forecast, "its JSON Schema is a str; give it as a dict"),
        (CITY, len, "its function takes 'obj' only by position; remove the `/`"),
        ({"type": "object", "required": ["q"]}, lambda: 1, "its function has no parameter 'q'"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_at_once(schema: Any, call: Any, sentence: str) -> None:
    with pytest.raises(ToolSignatureError, match=f"tool `forecast`: .*{sentence}"):
        made(call, schema)


def test_a_context_cannot_have_the_name_of_an_argument() -> None:
    def call(city: ToolContext, **more: Any) -> str:
        return ""

    with pytest.raises(ToolSignatureError, match="argument 'city' is also its ToolContext"):
        made(call)


def test_calls_in_python_are_checked_too() -> None:
    with pytest.raises(ToolSignatureError, match="tool `forecast`: arguments: 'city' is a required property"):
        made().on(days=1)
    with pytest.raises(ToolSignatureError, match="tool `forecast`: its arguments are given by name"):
        made().on("Lima")


def test_nothing_that_a_schema_refers_to_is_fetched() -> None:
    tool = made(schema={"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/never.json"}}})
    with pytest.raises(ToolSignatureError, match="refers to 'http://127.0.0.1:9/never.json', which it does not hold"):
        tool.on(a=1)

    class Desk(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return str(ctx.do(tool.on(a=1)))

    with pytest.raises(RunFailedError, match="which it does not hold"):
        FakeMesh(Desk()).run("x")


def test_a_schema_that_refers_to_itself_for_ever() -> None:
    tool = made(schema={"type": "object", "$ref": "#"})
    with pytest.raises(ToolSignatureError, match="tool `forecast`: the arguments are nested too deeply"):
        tool.on(a=1)


def test_an_argument_may_have_any_name() -> None:
    words: dict[str, Any] = {"self": 1, "tool": 2, "func": 3}
    tool = made(lambda **arguments: sorted(arguments), {"type": "object"})
    assert tool.on(**words).arguments == words
    assert tool(**words) == tool.bind(words, ToolContext())() == ["func", "self", "tool"]


def test_an_older_draft_is_taken_at_its_word() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"at": {"type": "array", "items": [{"type": "number"}], "additionalItems": False}},
    }
    with pytest.raises(ToolSignatureError, match="at: Additional items are not allowed"):
        made(schema=schema).on(at=[1, 2])


def test_jsonschema_is_loaded_with_the_first_such_tool() -> None:
    code = "import sys, agentmesh; agentmesh.Agent, agentmesh.tool, agentmesh.Crew; print('jsonschema' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
