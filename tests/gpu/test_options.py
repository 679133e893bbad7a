"""Options at their edges: refused by name before anything is computed, or they do what they say."""

import math
from typing import Any

import pytest
import torch

from agentmesh.errors import ModelError
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import Done, InferenceRequest
from agentmesh.inference.sampling import DrawOptions, draw
from agentmesh.inference.tokenization import AnswerStream
from agentmesh.message import Message, ToolSpec, user
from agentmesh.model import Answer, Prompt
from agentmesh.models.local import LocalOptions, _answer
from agentmesh.testing.tiny_models import make_tokenizer

GO = ToolSpec("go", "Go.", {"type": "object", "properties": {}})
WAIT_S = 30


def options(*tools: ToolSpec, **given: Any) -> LocalOptions:
    return LocalOptions.of(Prompt("tiny", [user("?")], tools, options=given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"temperature": "hot"}, "option `temperature` is 'hot': "),
        ({"temperature": -1}, "option `temperature` is -1: "),
        ({"temperature": math.inf}, "option `temperature` is inf: "),
        ({"top_k": 2.5}, "option `top_k` is 2.5: "),
        ({"top_p": 1.5}, "option `top_p` is 1.5: "),
        ({"max_tokens": 0}, "option `max_tokens` is 0: "),
        ({"stop": [1]}, "option `stop` is 1: "),
        ({"tool_choice": {"type": "auto"}}, "option `tool_choice` is {'type': 'auto'}: "),
        ({"tool_choice": "stay"}, "option `tool_choice` is 'stay'; use one of: auto, none, required, go"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as e:
        options(GO, **given)
    assert str(e.value).startswith(told)


def test_options_are_read_as_servers_read_them() -> None:
    named = {"type": "function", "function": {"name": "go"}}
    found = options(GO, top_k="40", seed=None, stop="x", tool_choice=named, frequency_penalty=1)
    assert found == LocalOptions(top_k=40, stop=("x",), tool_choice="go", seed=found.seed)
    assert options(seed=7).seed == 7
    assert options(max_tokens=3.0).max_tokens == 3
    assert options(tool_choice="required").tool_choice == "required"  # of no tools


def test_a_model_that_must_call_no_tool_calls_none() -> None:
    telling = AnswerStream(make_tokenizer())
    said = '<tool_call>{"name": "go", "arguments": {}}</tool_call>'
    telling.finish(make_tokenizer()(said)["input_ids"])

    def answer(**given: Any) -> Answer:
        prompt = Prompt("tiny", [user("?")], [GO], options=given)
        return _answer(prompt, InferenceRequest((5,), 8), telling, Done((6,), "stop"))

    assert [c.name for c in answer().message.tool_calls] == ["go"]
    assert (answer(tool_choice="none").message, answer(tool_choice="none").finish) == (
        Message("assistant", said),
        "stop",
    )


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 1e-300])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.9)])
def test_next_to_no_temperature_takes_the_likeliest(temperature: float, top_k: int, top_p: float) -> None:
    row = torch.tensor([[1.0, 2.0, 5.0, 4.9, -math.inf]])
    assert draw(row, [DrawOptions(temperature, top_k, top_p, 7, 0)]).tolist() == [2]


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.9999)])
def test_any_heat_leaves_out_what_is_forbidden(temperature: float, top_k: int, top_p: float) -> None:
    rows = torch.tensor([[1.0, 2.0, 5.0, 4.9, -math.inf]]).expand(200, 5)
    assert set(draw(rows, [DrawOptions(temperature, top_k, top_p, s, 0) for s in range(200)]).tolist()) == {0, 1, 2, 3}


def test_no_share_at_all_and_the_first_alone_are_greedy(engine: InferenceEngine) -> None:
    greedy = engine.submit(InferenceRequest((5, 6, 7), 8)).result(WAIT_S).tokens
    for how in ({"top_p": 0.0}, {"top_p": 1e-30}, {"top_k": 1}, {"temperature": 1e-40}):
        wish: dict[str, Any] = {"temperature": 3.0, "seed": 1} | how
        assert engine.submit(InferenceRequest((5, 6, 7), 8, **wish)).result(WAIT_S).tokens == greedy, how
