"""Attention in the engine: unusual models answer as they do alone, and a kernel is used only when it passes the check."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward

from agentmesh.errors import ConfigError
from agentmesh.inference import attention, kernels
from agentmesh.inference.attention import paged_attention
from agentmesh.inference.batching import Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.kernels import Heads, Kernel, difference, page_difference
from agentmesh.inference.request import InferenceRequest
from agentmesh.testing.tiny_models import VOCABULARY, make_model

WAIT_S = 30
MakeEngine = Callable[..., InferenceEngine]
CAP, WINDOW = 1.5, 16
SMALL = Shape(pages=80, page_tokens=16, batch_tokens=64, batch_requests=32)


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


def answers(model: Any, asked: list[list[int]], make_engine: MakeEngine, attention: str = "") -> list[list[int]]:
    engine = make_engine(replace(SMALL, attention=attention), model=model)
    futures = [engine.submit(InferenceRequest(tuple(p), 24)) for p in asked]
    return [list(f.result(WAIT_S).tokens) for f in futures]


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
def test_softcaps_and_sinks_are_what_the_model_s_own_attention_makes_of_them(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, device: str, kind: str
) -> None:
    asked = [[3 + (7 * i + j * (i + 3)) % (VOCABULARY - 3) for j in range(6 + 9 * i)] for i in range(6)]
    alone = odd_model(kind).to(device)
    expected = [by_generate(alone, p, 24) for p in asked]
    got = answers(odd_model(kind), asked, make_engine)
    assert got == expected
    monkeypatch.setattr(attention, "MAX_SCORES", 100)  # a few tokens at a time
    assert answers(odd_model(kind), asked, make_engine) == expected
    monkeypatch.setattr(attention, "reference_attention", without(attention.reference_attention, kind))
    untried = answers(odd_model(kind), asked, make_engine, attention.PAGED_NAME)
    assert untried != expected  # the models are made so that it matters


def without(plain: Any, kind: str) -> Any:
    return lambda *args, **given: plain(*args, **{**given, kind: None})


@pytest.mark.parametrize("name", attention.UNSUPPORTED)
def test_what_else_a_model_does_to_its_scores_is_not_overlooked(name: str) -> None:
    tokens = torch.zeros(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match=f"does not support {name}: use a ServerQueue"):
        paged_attention(None, tokens, tokens, tokens, None, **{name: torch.zeros(1)})


# ---- the choice of a kernel --------------------------------------------------------------------
EVERY = [
    Heads(4, 2, 8), Heads(4, 4, 16), Heads(8, 1, 64), Heads(4, 2, 8, window=40), Heads(4, 2, 8, window=3),
    Heads(4, 2, 8, 40, 1.5), Heads(4, 2, 8, 40, 0.0, True),
]  # fmt: skip
CPU = torch.device("cpu")


def raising(*args: Any, **given: Any) -> Any:
    raise RuntimeError("no kernel image is available")


def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
    """Sees one key too few in a window, and in a prompt one too many."""
    window = given.pop("sliding_window")
    return paged_attention(module, query, key, value, mask, sliding_window=(window or 130) - 1, **given)


def topleft(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
    """Aligns the mask of new tokens with the first keys, as sdpa's `is_causal` does."""
    out = torch.empty_like(query)
    starts_q, starts_k = given["cu_seq_lens_q"].tolist(), given["cu_seq_lens_k"].tolist()
    for i in range(len(starts_q) - 1):
        q, k = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        attend = torch.nn.functional.scaled_dot_product_attention
        out[:, :, q] = attend(
            query[:, :, q], key[:, :, k], value[:, :, k], is_causal=True, scale=given["scaling"], enable_gqa=True
        )
    return out.transpose(1, 2), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", EVERY)
def test_our_own_attention_passes_its_trial(heads: Heads, dtype: torch.dtype) -> None:
    assert difference(Kernel("ours", paged_attention), heads, CPU, dtype) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", EVERY)
def test_a_kernel_that_is_a_little_wrong_does_not_pass(heads: Heads, dtype: torch.dtype) -> None:
    assert difference(Kernel("wrong", wrong), heads, CPU, dtype).startswith("it is off by ")
    assert difference(Kernel("topleft", topleft), heads, CPU, dtype).startswith("it is off by ")
    unscaled = lambda *args, **given: paged_attention(*args, **{**given, "scaling": None})  # noqa: E731
    assert difference(Kernel("unscaled", unscaled), heads, CPU, dtype).startswith("it is off by ")
    assert difference(Kernel("short", lambda *args, **given: (torch.zeros(1, 2), None)), heads, CPU, dtype).startswith(
        "its output has the shape (1, 2), not "
    )


def test_the_best_kernel_that_passes_is_taken_and_the_log_says_why(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(make_model(), [[5, 6, 7]], make_engine)
    right = lambda *args, **given: paged_attention(*args, **given)  # noqa: E731
    there = [
        Kernel("test_raising", raising),
        Kernel("test_wrong", wrong),
        Kernel("test_right", right),
        *kernels.kernels(CPU),
    ]
    monkeypatch.setattr(kernels, "kernels", lambda device: there)
    with caplog.at_level("INFO", "agentmesh.gpu"):
        engine = make_engine(model=(model := make_model()))
    assert (engine._batching.attention, model.config._attn_implementation) == ("test_right", "test_right")
    assert list(engine.submit(InferenceRequest((5, 6, 7), 24)).result(WAIT_S).tokens) == expected[0]
    (told,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("attention: ")]
    assert re.fullmatch(
        r"attention: test_right \(test_raising: RuntimeError: no kernel image is available; "
        r"test_wrong: it is off by [\d.]+\)",
        told,
    )


def test_where_none_passes_no_engine_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda device: [Kernel("test_raising", raising)])
    with pytest.raises(
        ConfigError, match=r"works on cpu in torch.float32 \(test_raising: RuntimeError: no kernel image"
    ):
        InferenceEngine(make_model(), SMALL)


def test_on_a_cpu_it_is_ours_and_on_cuda_torch_s_comes_first() -> None:
    assert [k.name for k in kernels.kernels(CPU)] == [attention.PAGED_NAME]
    assert [k.name for k in kernels.kernels(torch.device("cuda"))][-2:] == [kernels.VARLEN_NAME, attention.PAGED_NAME]


def test_a_kernel_may_be_wished_for(make_engine: MakeEngine) -> None:
    engine = make_engine(replace(SMALL, attention="sdpa"), model=(model := make_model()))
    assert (engine._batching.attention, model.config._attn_implementation) == ("sdpa", "sdpa")
    other = make_engine(model=model)
    assert (other._batching.attention, model.config._attn_implementation) == (
        attention.PAGED_NAME,
        attention.PAGED_NAME,
    )


# ---- kernels that are not on this machine, as their own docs say they are ------------------------
def documented(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts_q: torch.Tensor, starts_k: torch.Tensor, *, scale: float,
    left: int, causal: bool, softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Packed (q, h, e): a window of `left` keys beside a token's own, masks aligned with the last key."""
    assert causal
    assert {starts_q.dtype, starts_k.dtype} == {torch.int32}
    out = torch.empty_like(q)
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        one = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        said = attention.reference_attention(
            *one, scale, window=left + 1 if left >= 0 else None, softcap=softcap or None
        )
        out[a:b] = said[0].transpose(0, 1)
    return out


def fake_varlen(
    q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, max_q: int, max_k: int, *, scale: float,
    window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert (max_q, max_k) == (int(starts_q.diff().max()), int(starts_k.diff().max()))
    return documented(q, k, v, starts_q, starts_k, scale=scale, left=window_size[0], causal=window_size[1] == 0)


@pytest.mark.parametrize("heads", EVERY)
def test_torch_s_kernel_is_called_as_its_docs_say(monkeypatch: pytest.MonkeyPatch, heads: Heads) -> None:
    monkeypatch.setattr(kernels, "varlen_attn", fake_varlen)
    assert difference(Kernel("varlen", kernels.varlen_attention), heads, CPU, torch.bfloat16) == ""
    monkeypatch.setattr(kernels, "varlen_attn", raising)
    odd = bool(heads.softcap or heads.sinks)  # which go to ours
    told = difference(Kernel("varlen", kernels.varlen_attention), heads, CPU, torch.bfloat16)
    assert told == ("" if odd else "RuntimeError: no kernel image is available")


def test_torch_takes_what_it_is_called_with() -> None:
    """Its own operator on tensors without values, which are of any device."""
    places: dict[str, Any] = {"device": "meta", "dtype": torch.int32}
    query = torch.empty(1, 8, 10, 16, device="meta", dtype=torch.bfloat16)
    key = torch.empty(1, 2, 30, 16, device="meta", dtype=torch.bfloat16)
    with torch.inference_mode():
        out, _ = kernels.varlen_attention(
            None, query, key, key, None, scaling=0.1, sliding_window=5, max_length_q=6, max_length_k=20,
            cu_seq_lens_q=torch.empty(3, **places), cu_seq_lens_k=torch.empty(3, **places),
        )  # fmt: skip
    assert out.shape == (1, 10, 8, 16)
    told = difference(Kernel("varlen", kernels.varlen_attention), EVERY[0], CPU, torch.bfloat16)
    assert told.startswith("NotImplementedError: Could not run 'aten::_flash_attention_forward'")
    assert len(told) < 250


def flash_varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float = 0.0, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    return documented(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, left=window_size[0], causal=causal, softcap=softcap
    )


def flash_with_cache(
    q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, cache_seqlens: Any = None, block_table: Any = None,
    softmax_scale: float = 0.0, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """One new token of each request: (n, 1, h, e)."""
    out, size = torch.empty_like(q), k_cache.shape[1]
    for i, cached in enumerate(cache_seqlens.tolist()):
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[block_table[i, cached // size], cached % size] = new[i, 0]
        seen = (
            cache[block_table[i, : cached // size + 1]].flatten(0, 1)[None, : cached + 1]
            for cache in (k_cache, v_cache)
        )
        one = (x.transpose(1, 2) for x in (q[i : i + 1], *seen))
        out[i] = attention.reference_attention(*one, softmax_scale, softcap=softcap or None)[0].transpose(0, 1)
    return out


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Flash attention's wheel, as transformers would find it."""
    define = modeling_flash_attention_utils._lazy_define_process_function
    found = (None, flash_varlen, flash_with_cache, None, None), (define(flash_varlen), define(flash_with_cache))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: found)
    return Kernel("flash_attention_2", flash_attention_forward, pages=True)


@pytest.mark.parametrize("heads", EVERY)
def test_the_wheel_passes_through_transformers_own_door(wheel: Kernel, heads: Heads) -> None:
    told = difference(wheel, heads, CPU, torch.bfloat16)
    assert told.startswith("it is off by ") if heads.sinks else told == ""  # it overlooks sinks without a word
    told = page_difference(wheel, heads, 256, CPU, torch.bfloat16)
    assert told == ("it cannot read the cache's pages" if heads.window else "")
    assert page_difference(wheel, heads, 32, CPU, torch.bfloat16) == "it cannot read the cache's pages"


def test_a_wheel_that_reads_the_wrong_pages_is_used_without_them(
    wheel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly = flash_with_cache
    define = modeling_flash_attention_utils._lazy_define_process_function

    def astray(*args: Any, cache_seqlens: Any = None, block_table: Any = None, softmax_scale: float = 0.0,
               causal: bool = False, softcap: float = 0.0) -> Any:  # fmt: skip
        return plainly(
            *args, cache_seqlens=cache_seqlens, block_table=block_table.roll(1, 0), softmax_scale=softmax_scale
        )

    found = (None, flash_varlen, astray, None, None), (define(flash_varlen), define(astray))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: found)
    assert difference(wheel, EVERY[0], CPU, torch.bfloat16) == ""
    assert page_difference(wheel, EVERY[0], 256, CPU, torch.bfloat16).startswith("it is off by ")


def test_a_wheel_is_never_looked_for_on_a_hub(wheel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda device: [wheel, Kernel("test_right", paged_attention)])
    assert kernels.choose(odd_model("sinks"), 32).name == "test_right"
