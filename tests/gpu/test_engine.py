"""The engine on a tiny made model: what is promised of batches, and every way in which the library's loop can die."""

import concurrent.futures
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Phi3Config, Qwen3Config

from agentmesh.errors import ContextTooLong, GpuOutOfMemory, ModelError
from agentmesh.gpu.batching import Batching, Shape
from agentmesh.gpu.engine import Engine
from agentmesh.gpu.request import Done, EngineDown, Request
from agentmesh.testing.tiny import VOCABULARY, made_model, one_by_one

WAIT_S = 30
MakeEngine = Callable[..., Engine]


def prompts(n: int, *, shortest: int = 3) -> list[list[int]]:
    """Prompts of many lengths, none the beginning of another."""
    return [[3 + (7 * i + j * (i + 3)) % (VOCABULARY - 3) for j in range(shortest + 5 * i % 40)] for i in range(n)]


def answers(engine: Engine, requests: Sequence[Request]) -> list[Done]:
    return [f.result(WAIT_S) for f in [engine.submit(r) for r in requests]]


class Fault:
    """Makes the forward pass of a model raise while `when` says so."""

    def __init__(self, model: Any, error: Exception, when: Callable[[list[int]], bool]) -> None:
        self.times, self._forward, self._error, self._when = 0, model.forward, error, when
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._when(kwargs["input_ids"][0].tolist()):
            self.times += 1
            raise self._error
        return self._forward(*args, **kwargs)


# ---- batches -----------------------------------------------------------------------------------
def test_greedy_in_a_batch_is_greedy_one_by_one(engine: Engine, device: str) -> None:
    asked = prompts(12)
    done = answers(engine, [Request(tuple(p), 16) for p in asked])
    plain = made_model().to(device)
    assert [list(d.tokens) for d in done] == [one_by_one(plain, p, 16) for p in asked]
    assert max(d.batch for d in done) == 12
    assert {d.finish for d in done} == {"length"}


@pytest.mark.parametrize("kind", ["mistral, a window of 16", "qwen3", "gpt2", "phi3"])
def test_other_kinds_of_models_say_in_a_batch_what_they_say_alone(
    make_engine: MakeEngine, device: str, kind: str
) -> None:
    asked = prompts(6, shortest=10)
    done = answers(make_engine(model=other_model(kind)), [Request(tuple(p), 24) for p in asked])
    plain = other_model(kind).to(device)
    assert [list(d.tokens) for d in done] == [one_by_one(plain, p, 24) for p in asked]


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
    make_engine: MakeEngine, device: str
) -> None:
    asked = prompts(8)
    done = answers(make_engine(model=made_model(dtype=torch.bfloat16)), [Request(tuple(p), 12) for p in asked])
    plain = made_model(dtype=torch.bfloat16).to(device)
    for prompt, said in zip(asked, done, strict=True):
        for at, token in enumerate(said.tokens):
            with torch.inference_mode():
                scores = plain(torch.tensor([prompt + list(said.tokens[:at])], device=device)).logits[0, -1]
            likeliest = scores.float().max()
            unit = 2.0 ** (
                torch.floor(torch.log2(likeliest.abs())) - 7
            )  # of the last place: a bfloat16 keeps 7 bits of fraction
            assert likeliest - scores.float()[token] <= 4 * unit


def test_a_seed_draws_the_same_alone_in_company_and_with_other_neighbours(engine: Engine) -> None:
    drawn = [Request(tuple(p), 20, temperature=1.5, seed=i) for i, p in enumerate(prompts(10))]
    alone = [engine.submit(r).result(WAIT_S).tokens for r in drawn]
    assert [d.tokens for d in answers(engine, drawn)] == alone
    assert [d.tokens for d in answers(engine, drawn[::-1][:7])] == alone[::-1][:7]
    assert len({engine.submit(Request((5, 6), 8, temperature=1.5, seed=s)).result(WAIT_S).tokens for s in range(5)}) > 1


def test_what_was_evicted_goes_on_as_if_nothing_had_happened(make_engine: MakeEngine) -> None:
    wanted = [Request(tuple(p), 60, temperature=1.2, seed=i) for i, p in enumerate(prompts(8, shortest=20))]
    roomy = [d.tokens for d in answers(make_engine(), wanted)]
    tight = make_engine(Shape(pages=12, page_tokens=16, batch_tokens=64, batch_requests=32))
    evicted = counted_evictions(tight)
    assert [d.tokens for d in answers(tight, wanted)] == roomy
    assert evicted


def counted_evictions(engine: Engine) -> list[bool]:
    """One entry for each time the library took requests out of its full cache."""
    found: list[bool] = []
    manager = engine._batching.batch_processor.offloading_manager
    plain = manager.offload_requests

    def counted() -> bool:
        found.append(plain())
        return found[-1]

    manager.offload_requests = counted
    return found


def test_top_k_and_top_p_leave_out_the_unlikely(engine: Engine, device: str) -> None:
    scores = made_model().to(device)(torch.tensor([[5, 6, 7]], device=device)).logits[0, -1].detach()
    best = set(scores.topk(3).indices.tolist())
    first = {
        engine.submit(Request((5, 6, 7), 1, temperature=9.0, top_k=3, seed=s)).result(WAIT_S).tokens[0]
        for s in range(40)
    }
    assert first == best
    one = scores.argmax().item()
    narrow = {
        engine.submit(Request((5, 6, 7), 1, temperature=0.01, top_p=0.05, seed=s)).result(WAIT_S).tokens[0]
        for s in range(5)
    }
    assert narrow == {one}


def test_drawing_follows_the_model_s_own_probabilities(engine: Engine, device: str) -> None:
    shares = made_model().to(device)(torch.tensor([[5, 6, 7]], device=device)).logits[0, -1].detach().softmax(0)
    n = 400
    done = answers(engine, [Request((5, 6, 7), 1, temperature=1.0, seed=s) for s in range(n)])
    likeliest = int(shares.argmax())
    found = sum(d.tokens[0] == likeliest for d in done) / n
    share = float(shares[likeliest])
    assert abs(found - share) < 4 * (share * (1 - share) / n) ** 0.5  # four standard deviations; the seeds are fixed


def test_logprobs_are_the_model_s_before_any_noise(engine: Engine, device: str) -> None:
    done = engine.submit(Request((5, 6, 7), 6, temperature=3.0, seed=1, logprobs=True)).result(WAIT_S)
    plain, said = made_model().to(device), [5, 6, 7]
    for token, logprob in zip(done.tokens, done.logprobs, strict=True):
        with torch.inference_mode():
            assert logprob == pytest.approx(
                float(plain(torch.tensor([said], device=device)).logits[0, -1].log_softmax(0)[token]), abs=1e-4
            )
        said.append(token)


def test_an_end_token_ends_the_answer_and_is_no_part_of_it(engine: Engine) -> None:
    whole = engine.submit(Request((5, 6, 7), 8)).result(WAIT_S).tokens
    end = whole[4]
    done = engine.submit(Request((5, 6, 7), 8, ends=frozenset({end, 299}))).result(WAIT_S)
    assert (done.tokens, done.finish) == (whole[: whole.index(end)], "stop")


def test_a_prompt_that_begins_alike_is_not_computed_again(engine: Engine) -> None:
    shared = tuple(range(10, 90))
    first = engine.submit(Request((*shared, 5), 2)).result(WAIT_S)
    second = engine.submit(Request((*shared, 6), 2)).result(WAIT_S)
    assert (first.cached_tokens, second.cached_tokens) == (0, 80)
    assert engine.gauge.cached_tokens == 80


def test_a_listener_hears_tokens_as_they_come_and_may_have_enough(engine: Engine, eventually: Any) -> None:
    heard: list[tuple[int, ...]] = []
    whole = engine.submit(Request((5, 6, 7), 8), lambda t: heard.append(tuple(t)) is not None).result(WAIT_S).tokens
    assert heard == [whole[: n + 1] for n in range(8)]
    done = engine.submit(Request((5, 6, 7), 400), lambda t: len(t) >= 3).result(WAIT_S)
    assert (done.tokens, done.finish) == (whole[:3], "stop")
    eventually(lambda: engine.gauge.idle and engine.gauge.free_pages == engine.gauge.pages)


# ---- what the library does not forgive (docs/guides/gpu.md, "What the engine guards") -----------
@pytest.mark.parametrize(
    ("tokens", "most", "error", "told"),
    [
        (
            (5,) * 200,
            900,
            ContextTooLong,
            r"has 200 tokens and asks for 900 more; the model's context takes 1024 together",
        ),
        ((), 4, ModelError, "a request of 0 tokens that asks for 4 more is empty"),
        ((5,), 0, ModelError, "a request of 1 tokens that asks for 0 more is empty"),
        ((5, VOCABULARY), 4, ModelError, f"token id {VOCABULARY} is not in the model's vocabulary of {VOCABULARY}"),
        ((5, -1), 4, ModelError, "token id -1 is not in"),
    ],
)
def test_what_would_end_the_loop_is_refused_up_front(
    engine: Engine, tokens: tuple[int, ...], most: int, error: type[Exception], told: str
) -> None:
    other = engine.submit(Request((5, 6, 7), 40))
    with pytest.raises(error, match=told):
        engine.submit(Request(tokens, most))
    assert len(other.result(WAIT_S).tokens) == 40
    assert engine.gauge.deaths == 0


def test_what_the_cache_cannot_hold_is_refused_and_what_it_can_is_done(make_engine: MakeEngine) -> None:
    engine = make_engine(Shape(pages=10, page_tokens=16, batch_tokens=64))
    assert engine.room.longest == 144
    with pytest.raises(ContextTooLong, match="the cache of this process takes 144 together"):
        engine.submit(Request((5,) * 100, 45))
    assert len(engine.submit(Request((5,) * 100, 44)).result(WAIT_S).tokens) == 44


def test_two_requests_that_are_alike_both_get_an_answer(engine: Engine) -> None:
    same = Request((5, 6, 7), 12)
    first, second = answers(engine, [same, same])
    assert first.tokens == second.tokens


def test_a_cancelled_future_gives_its_place_back(engine: Engine, eventually: Any) -> None:
    began = threading.Event()
    long = engine.submit(Request((5, 6, 7), 500), lambda t: bool(began.set()))
    waiting = [engine.submit(Request((5, 6, 7), 400)) for _ in range(30)]
    assert began.wait(WAIT_S)
    assert long.cancel()
    assert all(w.cancel() for w in waiting)
    eventually(lambda: engine.gauge.idle and engine.gauge.free_pages == engine.gauge.pages)
    assert engine.submit(Request((5, 6, 7), 4)).result(WAIT_S).tokens
    with pytest.raises(concurrent.futures.CancelledError):
        long.result(0)


def test_a_dead_loop_is_made_anew_and_its_requests_begin_again(make_engine: MakeEngine) -> None:
    model = made_model()
    calm = [
        d.tokens for d in answers(make_engine(), [Request(tuple(p), 20, temperature=1.0, seed=4) for p in prompts(6)])
    ]
    seen: list[int] = []
    fault = Fault(model, RuntimeError("a passing fault"), lambda ids: seen.append(1) is None and len(seen) == 9)
    engine = make_engine(model=model)
    heard: list[int] = []
    asked = [
        engine.submit(Request(tuple(p), 20, temperature=1.0, seed=4), lambda t: heard.append(len(t)) is not None)
        for p in prompts(6)
    ]
    assert [f.result(WAIT_S).tokens for f in asked] == calm
    assert (fault.times, engine.gauge.deaths) == (1, 1)
    assert 1 in heard[heard.index(2) :]  # told again from the first token


def test_one_poison_among_sixty_three_others_fails_alone(make_engine: MakeEngine) -> None:
    model, poison = made_model(), 299
    fault = Fault(model, RuntimeError("it was the prompt"), lambda ids: poison in ids)
    engine = make_engine(Shape(pages=200, page_tokens=16, batch_tokens=64, batch_requests=64), model=model)
    # no answer says the poisonous token by itself
    others = [engine.submit(Request((5, 6 + i), 4, temperature=0.5, seed=i, top_k=3)) for i in range(63)]
    culprit = engine.submit(Request((5, poison), 4))
    late = engine.submit(Request((9, 9), 4, top_k=3))
    with pytest.raises(
        ModelError, match=r"this request of 2 \+ 4 tokens ends the engine's loop.*RuntimeError: it was the"
    ):
        culprit.result(WAIT_S)
    assert all(f.result(WAIT_S).tokens for f in [*others, late])
    assert fault.times <= 9  # once for all, once more, then halves of 64


def test_no_memory_halves_the_batch_twice_and_then_the_worker_is_told(make_engine: MakeEngine, eventually: Any) -> None:
    model = made_model()
    told: list[Exception] = []
    Fault(model, torch.OutOfMemoryError("CUDA out of memory"), lambda ids: len(ids) > 16)
    engine = make_engine(Shape(pages=64, page_tokens=16, batch_tokens=64), model=model, hopeless=told.append)
    assert len(engine.submit(Request((5,) * 60, 4)).result(WAIT_S).tokens) == 4
    assert (engine.gauge.batch_tokens, engine.gauge.deaths, told) == (16, 2, [])
    Fault(model, torch.OutOfMemoryError("CUDA out of memory"), lambda ids: True)
    with pytest.raises(EngineDown, match="OutOfMemoryError: CUDA out of memory"):
        engine.submit(Request((5,) * 60, 4)).result(WAIT_S)
    eventually(lambda: told)
    assert isinstance(told[0], torch.OutOfMemoryError)
    with pytest.raises(EngineDown):
        engine.submit(Request((5,), 4))


def test_no_memory_without_a_worker_fails_the_request_that_is_too_much(make_engine: MakeEngine) -> None:
    model = made_model()
    Fault(model, torch.OutOfMemoryError("no memory"), lambda ids: 299 in ids)
    engine = make_engine(model=model)
    with pytest.raises(GpuOutOfMemory, match=r"2 \+ 4 tokens"):
        engine.submit(Request((5, 299), 4)).result(WAIT_S)
    assert engine.submit(Request((5, 6), 4)).result(WAIT_S).tokens


def test_an_error_of_the_device_ends_the_engine(make_engine: MakeEngine, eventually: Any) -> None:
    model = made_model()
    told: list[Exception] = []
    Fault(model, RuntimeError("CUDA error: an illegal memory access"), lambda ids: True)
    engine = make_engine(model=model, hopeless=told.append)
    with pytest.raises(EngineDown, match="illegal memory access"):
        engine.submit(Request((5, 6), 4)).result(WAIT_S)
    eventually(lambda: told)
    assert not engine.alive


def test_a_hung_loop_can_be_seen(make_engine: MakeEngine, eventually: Any) -> None:
    model, hang = made_model(), threading.Event()
    Fault(model, RuntimeError(), lambda ids: hang.wait(WAIT_S) and False)
    engine = make_engine(model=model)
    asked = engine.submit(Request((5, 6), 4))
    before = engine.gauge.stepped_s
    eventually(lambda: time.monotonic() - engine.gauge.stepped_s > 0.2)
    assert engine.gauge.stepped_s <= max(before, engine.gauge.stepped_s)
    assert not engine.gauge.idle
    hang.set()
    assert asked.result(WAIT_S).tokens


def test_a_loop_that_hangs_while_it_is_made_anew_can_be_seen(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    engine, made, goes_on, seen = make_engine(), Batching.room, threading.Event(), list[bool]()
    monkeypatch.setattr(Batching, "room", lambda batching: (goes_on.wait(WAIT_S), made(batching))[1])
    fault = Fault(engine._model, RuntimeError("once"), lambda ids: fault.times == 0)
    asked = engine.submit(Request((5, 6), 4))

    def watch() -> None:
        eventually(lambda: engine.hung_s > 0.3)
        seen.append(True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    watcher.join(5)  # whoever makes the loop holds what others wait for
    goes_on.set()
    assert seen
    assert len(asked.result(WAIT_S).tokens) == 4
    eventually(lambda: engine.hung_s == 0)


def test_a_thousand_cancellations_leave_nothing_behind(engine: Engine, eventually: Any) -> None:
    asked = [engine.submit(Request((5 + i % 200, 6), 60)) for i in range(1000)]
    kept = asked[::100]
    for future in asked:
        if future not in kept:
            future.cancel()
    assert all(len(f.result(WAIT_S).tokens) == 60 for f in kept)
    eventually(lambda: engine.gauge.idle and engine.gauge.free_pages == engine.gauge.pages)
    assert engine._sampler._rows == {}


def test_a_closed_engine_fails_what_it_had_and_takes_no_more(engine: Engine) -> None:
    began = threading.Event()
    asked = engine.submit(Request((5, 6, 7), 500), lambda t: bool(began.set()))
    assert began.wait(WAIT_S)
    engine.close()
    with pytest.raises(EngineDown):
        asked.result(WAIT_S)
    with pytest.raises(EngineDown, match="is closed"):
        engine.submit(Request((5,), 1))


def test_a_forgotten_engine_lets_its_process_end() -> None:
    code = (
        "from agentmesh.testing.tiny import made_model\nfrom agentmesh.gpu.engine import Engine\n"
        "from agentmesh.gpu.batching import Shape\nfrom agentmesh.gpu.request import Request\n"
        "e = Engine(made_model(), Shape(pages=40, page_tokens=16))\n"
        "e.submit(Request((5,), 400)); print(len(e.submit(Request((5,), 4)).result().tokens))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
