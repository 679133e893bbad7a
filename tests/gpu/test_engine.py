"""The engine on a tiny made model: what is promised of batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Phi3Config, Qwen3Config

from agentmesh.inference.batching import Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import InferenceRequest
from agentmesh.testing.tiny_models import VOCABULARY, greedy_decode, make_model

WAIT_S = 30
MakeEngine = Callable[..., InferenceEngine]


def test_greedy_in_a_batch_is_greedy_one_by_one(
    engine: InferenceEngine, device: str, prompts: Any, answers: Any
) -> None:
    asked = prompts(12)
    done = answers(engine, [InferenceRequest(tuple(p), 16) for p in asked])
    plain = make_model().to(device)
    assert [list(d.tokens) for d in done] == [greedy_decode(plain, p, 16) for p in asked]
    assert max(d.batch for d in done) == 12
    assert {d.finish for d in done} == {"length"}


@pytest.mark.parametrize("kind", ["mistral, a window of 16", "qwen3", "gpt2", "phi3"])
def test_other_kinds_of_models_say_in_a_batch_what_they_say_alone(
    make_engine: MakeEngine, device: str, kind: str, prompts: Any, answers: Any
) -> None:
    asked = prompts(6, shortest=10)
    done = answers(make_engine(model=other_model(kind)), [InferenceRequest(tuple(p), 24) for p in asked])
    plain = other_model(kind).to(device)
    assert [list(d.tokens) for d in done] == [greedy_decode(plain, p, 24) for p in asked]


def other_model(kind: str) -> Any:
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.5, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if kind == "gpt2":
            config: Any = GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3
            )
        elif kind.startswith("mistral"):
            config = MistralConfig(**size, sliding_window=16)
        else:
            config = Qwen3Config(**size, head_dim=16) if kind == "qwen3" else Phi3Config(**size)
        made: Any = AutoModelForCausalLM.from_config(config)
        return made.eval()


def test_greedy_in_bfloat16_differs_only_where_two_tokens_are_as_good_as_equal(
    make_engine: MakeEngine, device: str, prompts: Any, answers: Any
) -> None:
    asked = prompts(8)
    done = answers(make_engine(model=make_model(dtype=torch.bfloat16)), [InferenceRequest(tuple(p), 12) for p in asked])
    plain = make_model(dtype=torch.bfloat16).to(device)
    for prompt, said in zip(asked, done, strict=True):
        for at, token in enumerate(said.tokens):
            with torch.inference_mode():
                scores = plain(torch.tensor([prompt + list(said.tokens[:at])], device=device)).logits[0, -1]
            likeliest = scores.float().max()
            unit = 2.0 ** (
                torch.floor(torch.log2(likeliest.abs())) - 7
            )  # of the last place: a bfloat16 keeps 7 bits of fraction
            assert likeliest - scores.float()[token] <= 4 * unit


def test_a_seed_draws_the_same_alone_in_company_and_with_other_neighbours(
    engine: InferenceEngine, prompts: Any, answers: Any
) -> None:
    drawn = [InferenceRequest(tuple(p), 20, temperature=1.5, seed=i) for i, p in enumerate(prompts(10))]
    alone = [engine.submit(r).result(WAIT_S).tokens for r in drawn]
    assert [d.tokens for d in answers(engine, drawn)] == alone
    assert [d.tokens for d in answers(engine, drawn[::-1][:7])] == alone[::-1][:7]
    assert (
        len(
            {
                engine.submit(InferenceRequest((5, 6), 8, temperature=1.5, seed=s)).result(WAIT_S).tokens
                for s in range(5)
            }
        )
        > 1
    )


def test_what_was_evicted_goes_on_as_if_nothing_had_happened(
    make_engine: MakeEngine, prompts: Any, answers: Any
) -> None:
    wanted = [InferenceRequest(tuple(p), 60, temperature=1.2, seed=i) for i, p in enumerate(prompts(8, shortest=20))]
    roomy = [d.tokens for d in answers(make_engine(), wanted)]
    tight = make_engine(Shape(pages=12, page_tokens=16, batch_tokens=64, batch_requests=32))
    evicted = counted_evictions(tight)
    assert [d.tokens for d in answers(tight, wanted)] == roomy
    assert evicted


def counted_evictions(engine: InferenceEngine) -> list[bool]:
    """One entry for each time the library took requests out of its full cache."""
    found: list[bool] = []
    manager = engine._batching.batch_processor.offloading_manager
    plain = manager.offload_requests

    def counted() -> bool:
        found.append(plain())
        return found[-1]

    manager.offload_requests = counted
    return found


def test_top_k_and_top_p_leave_out_the_unlikely(engine: InferenceEngine, device: str) -> None:
    scores = make_model().to(device)(torch.tensor([[5, 6, 7]], device=device)).logits[0, -1].detach()
    best = set(scores.topk(3).indices.tolist())
    first = {
        engine.submit(InferenceRequest((5, 6, 7), 1, temperature=9.0, top_k=3, seed=s)).result(WAIT_S).tokens[0]
        for s in range(40)
    }
    assert first == best
    one = scores.argmax().item()
    narrow = {
        engine.submit(InferenceRequest((5, 6, 7), 1, temperature=0.01, top_p=0.05, seed=s)).result(WAIT_S).tokens[0]
        for s in range(5)
    }
    assert narrow == {one}


def test_drawing_follows_the_model_s_own_probabilities(engine: InferenceEngine, device: str, answers: Any) -> None:
    shares = make_model().to(device)(torch.tensor([[5, 6, 7]], device=device)).logits[0, -1].detach().softmax(0)
    n = 400
    done = answers(engine, [InferenceRequest((5, 6, 7), 1, temperature=1.0, seed=s) for s in range(n)])
    likeliest = int(shares.argmax())
    found = sum(d.tokens[0] == likeliest for d in done) / n
    share = float(shares[likeliest])
    assert abs(found - share) < 4 * (share * (1 - share) / n) ** 0.5  # four standard deviations; the seeds are fixed


def test_logprobs_are_the_model_s_before_any_noise(engine: InferenceEngine, device: str) -> None:
    done = engine.submit(InferenceRequest((5, 6, 7), 6, temperature=3.0, seed=1, logprobs=True)).result(WAIT_S)
    plain, said = make_model().to(device), [5, 6, 7]
    for token, logprob in zip(done.tokens, done.logprobs, strict=True):
        with torch.inference_mode():
            assert logprob == pytest.approx(
                float(plain(torch.tensor([said], device=device)).logits[0, -1].log_softmax(0)[token]), abs=1e-4
            )
        said.append(token)


def test_an_end_token_ends_the_answer_and_is_no_part_of_it(engine: InferenceEngine) -> None:
    whole = engine.submit(InferenceRequest((5, 6, 7), 8)).result(WAIT_S).tokens
    end = whole[4]
    done = engine.submit(InferenceRequest((5, 6, 7), 8, ends=frozenset({end, 299}))).result(WAIT_S)
    assert (done.tokens, done.finish) == (whole[: whole.index(end)], "stop")


def test_a_prompt_that_begins_alike_is_not_computed_again(engine: InferenceEngine) -> None:
    shared = tuple(range(10, 90))
    first = engine.submit(InferenceRequest((*shared, 5), 2)).result(WAIT_S)
    second = engine.submit(InferenceRequest((*shared, 6), 2)).result(WAIT_S)
    assert (first.cached_tokens, second.cached_tokens) == (0, 80)
    assert engine.gauge.cached_tokens == 80


def test_a_listener_hears_tokens_as_they_come_and_may_have_enough(engine: InferenceEngine, eventually: Any) -> None:
    heard: list[tuple[int, ...]] = []
    whole = (
        engine.submit(InferenceRequest((5, 6, 7), 8), lambda t: heard.append(tuple(t)) is not None)
        .result(WAIT_S)
        .tokens
    )
    assert heard == [whole[: n + 1] for n in range(8)]
    done = engine.submit(InferenceRequest((5, 6, 7), 400), lambda t: len(t) >= 3).result(WAIT_S)
    assert (done.tokens, done.finish) == (whole[:3], "stop")
    eventually(lambda: engine.gauge.idle and engine.gauge.free_pages == engine.gauge.pages)
