"""Attention in the engine: models that treat their scores in their own way say what they say alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig

from agentmesh.gpu import attention
from agentmesh.gpu.attention import paged_attention
from agentmesh.gpu.engine import Engine
from agentmesh.gpu.request import Request
from agentmesh.testing.tiny import VOCABULARY

WAIT_S = 30
MakeEngine = Callable[..., Engine]
CAP, WINDOW = 1.5, 16


def odd_model(kind: str) -> Any:
    """Gemma 2 caps its scores, gpt-oss has sinks; both have windows on every other layer."""
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.5, "pad_token_id": 0,
        "sliding_window": WINDOW, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config: Any = (
            Gemma2Config(**size, attn_logit_softcapping=CAP, query_pre_attn_scalar=4)
            if kind == "softcap"
            else GptOssConfig(**size, num_local_experts=4, num_experts_per_tok=2)
        )
        made: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        return made.eval()


def by_generate(model: Any, tokens: list[int], most_tokens: int) -> list[int]:
    """What transformers' own loop says, alone."""
    given = torch.tensor([tokens], device=model.device)
    model.generation_config.eos_token_id = None
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=most_tokens, do_sample=False)
    said: list[int] = out[0, len(tokens) :].tolist()
    return said


def answers(model: Any, asked: list[list[int]], make_engine: MakeEngine, most_tokens: int = 24) -> list[list[int]]:
    engine = make_engine(model=model)
    futures = [engine.submit(Request(tuple(p), most_tokens)) for p in asked]
    return [list(f.result(WAIT_S).tokens) for f in futures]


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
def test_softcaps_and_sinks_are_what_the_model_s_own_attention_makes_of_them(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked = [[3 + (7 * i + j * (i + 3)) % (VOCABULARY - 3) for j in range(6 + 9 * i)] for i in range(6)]
    alone = odd_model(kind)
    expected = [by_generate(alone, p, 24) for p in asked]
    got = answers(odd_model(kind), asked, make_engine)
    assert got == expected
    monkeypatch.setattr(attention, "plain", without(attention.plain, kind))
    assert answers(odd_model(kind), asked, make_engine) != expected  # the models are made so that it matters


def without(plain: Any, kind: str) -> Any:
    return lambda *args, **given: plain(*args, **{**given, kind: None})


@pytest.mark.parametrize("name", attention.UNKNOWN)
def test_what_else_a_model_does_to_its_scores_is_not_overlooked(name: str) -> None:
    tokens = torch.zeros(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match=f"knows no {name}; put a server behind this queue"):
        paged_attention(None, tokens, tokens, tokens, None, **{name: torch.zeros(1)})
