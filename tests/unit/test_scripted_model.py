"""The scripted model: replies in order or by a function, an error for what nobody scripted."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import BaseModel

from agentmesh.errors import ModelError
from agentmesh.message import user
from agentmesh.model import Answer, Prompt
from agentmesh.testing.scripted import ScriptedModel, says, uses


def ask(model: ScriptedModel, text: str = "hi", on_token: Any = None) -> Answer:
    return asyncio.run(model.ask(Prompt("m", [user(text)]), on_token))


def test_replies_come_in_order() -> None:
    model = ScriptedModel([says("one"), "two", uses("add", a=1, b=2)])
    assert [ask(model).message.text, ask(model).message.text] == ["one", "two"]
    answer = ask(model)
    (call,) = answer.message.tool_calls
    assert (call.name, json.loads(call.arguments), answer.finish) == ("add", {"a": 1, "b": 2}, "tool_calls")
    assert [p.messages[-1].text for p in model.prompts] == ["hi"] * 3


def test_two_uses_are_one_turn_with_ids_of_their_own() -> None:
    model = ScriptedModel([uses("add", a=1) & uses("add", a=2), uses("add", a=3)])
    calls = [*ask(model).message.tool_calls, *ask(model).message.tool_calls]
    assert [json.loads(c.arguments)["a"] for c in calls] == [1, 2, 3]
    assert len({c.id for c in calls}) == 3


def test_a_tool_may_have_an_argument_of_any_name() -> None:
    (call,) = ask(ScriptedModel([uses("find", tool_name="x", text="y")])).message.tool_calls
    assert json.loads(call.arguments) == {"tool_name": "x", "text": "y"}


def test_what_is_no_text_is_said_as_json() -> None:
    class Point(BaseModel):
        x: int

    assert ask(ScriptedModel([says({"x": 1})])).message.text == '{"x": 1}'
    assert json.loads(ask(ScriptedModel([says(Point(x=1))])).message.text) == {"x": 1}


def test_an_exception_is_raised() -> None:
    with pytest.raises(ModelError, match="no luck"):
        ask(ScriptedModel([ModelError("no luck")]))


def test_a_function_answers_from_the_prompt() -> None:
    model = ScriptedModel(lambda prompt: says(prompt.messages[-1].text.upper()))
    assert ask(model, "loud").message.text == "LOUD"


def test_a_question_that_is_not_in_the_script_is_named() -> None:
    model = ScriptedModel(["one"])
    ask(model)
    with pytest.raises(ModelError, match="prompt 2 is not in the script: 'and now\\?'; add a reply"):
        ask(model, "and now?")


@pytest.mark.parametrize("text", ["one two  three", " led and trailed \n", "one", "", "\n"])
def test_the_tokens_are_the_text(text: str) -> None:
    tokens: list[str] = []
    ask(ScriptedModel([says(text)]), on_token=tokens.append)
    assert "".join(tokens) == text


def test_threads_share_a_script() -> None:
    replies = [str(i) for i in range(200)]
    model = ScriptedModel(replies)
    with ThreadPoolExecutor(8) as pool:
        said = [answer.message.text for answer in pool.map(lambda _: ask(model), replies)]
    assert sorted(said) == sorted(replies)
