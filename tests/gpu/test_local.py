"""LocalModel on the engine: a made model of the cache, asked by many at once."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, Gemma2ForCausalLM

from agentmesh.errors import ConfigError, ContextTooLong, ModelError
from agentmesh.message import Message, ToolSpec, Usage, user
from agentmesh.model import Answer, Prompt, RetryLater, Thought
from agentmesh.models.local import LocalModel
from agentmesh.testing.tiny_models import save_model

SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}
GO = ToolSpec("go", "Go.", {"type": "object", "properties": {"to": {"enum": ["N", "S"]}}, "required": ["to"],
                            "additionalProperties": False})  # fmt: skip
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
Home = Callable[..., LocalModel]


pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A model of a cache of its own, with this template."""

    def make(*template: str, more: tuple[str, ...] = ()) -> LocalModel:
        monkeypatch.setenv("AGENTMESH_CACHE", str(save_model(tmp_path, *template, more=more)))
        return LocalModel("tiny")

    return make


def asked(model: LocalModel, *prompts: Prompt, heard: list[str] | None = None) -> list[Answer]:
    async def go() -> list[Answer]:
        try:
            return list(
                await asyncio.gather(*(model.ask(p, heard.append if heard is not None else None) for p in prompts))
            )
        finally:
            await asyncio.sleep(0)
            await model.close()

    return asyncio.run(go())


def test_all_who_ask_at_once_share_batches(home: Home) -> None:
    prompts = [Prompt("tiny", [user(f"number {i}")], options={"max_tokens": 12}) for i in range(20)]
    together = asked(home(), *prompts)
    assert together[7].message == asked(home(), prompts[7])[0].message
    assert max(a.usage.batch for a in together) == 20
    assert Usage.from_json(together[0].usage.to_json()) == together[0].usage


def test_a_wanted_schema_is_met_by_a_model_that_knows_nothing(home: Home) -> None:
    prompts = [Prompt("tiny", [user("?")], output=SCHEMA, options={"temperature": 9.0, "seed": s}) for s in range(4)]
    for answer in asked(home(), *prompts):
        assert answer.finish == "stop"
        assert set(json.loads(answer.message.text)) == {"yes"}


def test_a_tool_is_called_when_it_must_be(home: Home) -> None:
    options: dict[str, Any] = {
        "temperature": 9.0,
        "seed": 1,
        "tool_choice": {"type": "function", "function": {"name": "go"}},
    }
    (answer,) = asked(home(more=("<tool_call>", "</tool_call>")), Prompt("tiny", [user("?")], [GO], options=options))
    (call,) = answer.message.tool_calls
    assert (answer.finish, call.name, answer.message.text) == ("tool_calls", "go", "")
    assert json.loads(call.arguments)["to"] in ("N", "S")


def test_reasoning_is_streamed_as_its_own_kind_and_is_no_part_of_the_answer(home: Home) -> None:
    heard: list[str] = []
    prompt = Prompt("tiny", [user("?")], output=SCHEMA, options={"temperature": 9.0, "seed": 3, "max_tokens": 700})
    (answer,) = asked(home(THINKS, more=("<think>", "</think>")), prompt, heard=heard)
    thoughts = [h for h in heard if isinstance(h, Thought)]
    assert thoughts
    assert "".join(h for h in heard if not isinstance(h, Thought)) == answer.message.text
    assert set(json.loads(answer.message.text)) == {"yes"}


def test_a_schema_that_no_grammar_can_hold_is_only_told(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "https://example.org/elsewhere.json"}}}
    (answer,) = asked(home(), Prompt("tiny", [user("?")], output=schema, options={"max_tokens": 4}))
    assert answer.usage.output_tokens
    assert "this answer is not constrained to its schema" in caplog.text


def test_what_does_not_fit_is_refused(home: Home) -> None:
    with pytest.raises(ContextTooLong, match=r"asks for 8 more, and 'tiny' takes 1024 together"):
        asked(home(), Prompt("tiny", [user("x" * 1000)], options={"max_tokens": 8}))


def test_a_damaged_file_says_what_to_do(home: Home, tmp_path: Path) -> None:
    model = home()
    (tmp_path / "models" / "tiny" / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(
        ConfigError,
        match=r"local model 'tiny' of .* cannot be loaded .* agentmesh models rm tiny, then agentmesh models pull tiny",
    ):
        model.load()


def test_a_model_that_caps_its_attention_scores_answers(home: Home, tmp_path: Path) -> None:
    model, place = home(), tmp_path / "models" / "tiny"
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    made: Any = Gemma2ForCausalLM(Gemma2Config(**size, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))
    made.save_pretrained(place)
    (answer,) = asked(model, Prompt("tiny", [user("x")], options={"max_tokens": 4, "ignore_eos": True}))
    assert answer.usage.output_tokens == 4


def test_an_engine_that_went_down_is_made_anew(home: Home) -> None:
    model, prompt = home(), Prompt("tiny", [user("x")], options={"max_tokens": 4})

    async def go() -> Message:
        loaded = model.load()
        loaded.engine._model.forward = broken
        with pytest.raises(RetryLater, match="the engine of 'tiny' stopped: RuntimeError: CUDA error"):
            await model.ask(prompt)
        answer = await model.ask(prompt)
        assert model.load() is not loaded
        await model.close()
        return answer.message

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    assert asyncio.run(go()) == asked(home(), prompt)[0].message


def test_a_prompt_that_ends_the_loop_is_an_error_of_the_model(home: Home) -> None:
    model = home()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("never")

    model.load().engine._model.forward = broken
    with pytest.raises(ModelError, match="crashes the engine's loop"):
        asked(model, Prompt("tiny", [user("x")], options={"max_tokens": 4}))
