"""LocalModel: a tiny made model for its ways, and the real SmolLM2 for its words. No other download than that one."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from agentmesh.errors import ConfigError, ContextTooLong, ServiceDown
from agentmesh.hub.cache import cache_folder, model_folder
from agentmesh.hub.gguf import convert
from agentmesh.hub.pull import pull
from agentmesh.message import Message, ToolCall, ToolSpec, system, user
from agentmesh.model import Answer, Prompt
from agentmesh.models.local import LocalModel
from agentmesh.models.tool_call_parser import chat_turns, parse_tool_calls
from agentmesh.testing.tiny_models import save_model

HEADS, KV_HEADS, WIDTH, CONTEXT = 4, 2, 32, 64
HOME = str(cache_folder())  # before a test sets another
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokens() -> list[str]:
    """The 256 byte-level characters, in GPT-2's alphabet."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(rest))]


def made_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """The model as llama.cpp would store it: rotary rows in pairs, an own tokenizer of bytes."""
    tokens = ["<|end|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "he", "hel"]
    config = model.config
    out = gguf.GGUFWriter(str(file), "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    out.add_token_merges(["h e", "he l"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = HEADS if "q_proj" in name else KV_HEADS
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, WIDTH).swapaxes(1, 2).reshape(array.shape)
        if name != "lm_head.weight":
            out.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def gguf_name(name: str) -> str:
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q",
             "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
             "up_proj": "ffn_up", "down_proj": "ffn_down", "embed_tokens": "token_embd", "norm": "output_norm"}  # fmt: skip
    words = name.split(".")
    stem = parts[words[-2]]
    return f"blk.{words[2]}.{stem}.weight" if words[1] == "layers" else f"{stem}.weight"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A cache with the model `tiny` in it, converted from GGUF, and the model it was made of."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=261, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()  # so that storing it as bfloat16 loses nothing
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "models" / "tiny"
    folder.mkdir(parents=True)
    made_gguf(cache / "tiny.gguf", model)
    convert(cache / "tiny.gguf", folder)
    (folder / "agentmesh.json").write_text('{"name": "tiny", "source": "made"}')
    return cache, model


@pytest.fixture
def tiny(made: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch) -> LocalModel:
    monkeypatch.setenv("AGENTMESH_CACHE", str(made[0]))
    return LocalModel("tiny")


def ask(model: LocalModel, prompt: Prompt, said: list[str] | None = None) -> Answer:
    async def go() -> Answer:
        try:
            return await model.ask(prompt, None if said is None else said.append)
        finally:
            await asyncio.sleep(0)

    return asyncio.run(go())


def test_conversion_gives_back_every_weight(made: tuple[Path, LlamaForCausalLM]) -> None:
    found = load_file(made[0] / "models" / "tiny" / "model.safetensors")
    wanted = {n: w for n, w in made[1].state_dict().items() if n != "lm_head.weight"}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n].float(), w) for n, w in wanted.items())


def test_the_converted_model_computes_the_same(tiny: LocalModel, made: tuple[Path, LlamaForCausalLM]) -> None:
    folder = str(model_folder("tiny"))
    ids = torch.tensor([[1, 40, 80, 120, 2]])
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, made[1](ids).logits, atol=1e-5)


def test_greedy_answers_are_the_same_every_time(tiny: LocalModel) -> None:
    prompt = Prompt("tiny", [user("hello")], options={"max_tokens": 12})
    said: list[str] = []
    first, second = ask(tiny, prompt), ask(tiny, prompt, said)
    assert first == second
    assert "".join(said) == first.message.text
    assert 0 < first.usage.output_tokens <= 12
    assert first.usage.input_tokens == tiny.count("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


def test_a_seed_repeats_what_was_drawn(tiny: LocalModel) -> None:
    def drawn(seed: int) -> str:
        options = {"max_tokens": 12, "temperature": 1.5, "seed": seed}
        return ask(tiny, Prompt("tiny", [user("hello")], options=options)).message.text

    assert drawn(1) == drawn(1)
    assert len({drawn(s) for s in range(5)}) > 1


def test_a_stop_string_ends_the_answer_and_is_never_shown(tiny: LocalModel) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 2.0}
    for options["seed"] in range(100):
        whole = ask(tiny, Prompt("tiny", [user("hello")], options=options)).message.text
        clean = [i for i in range(2, len(whole) - 1) if "\ufffd" not in whole[i : i + 2]]
        if clean:
            break
    stop = whole[clean[0] : clean[0] + 2]
    said: list[str] = []
    answer = ask(tiny, Prompt("tiny", [user("hello")], options={**options, "stop": [stop]}), said)
    assert answer.message.text == whole.partition(stop)[0] == "".join(said)
    assert answer.finish == "stop"


def test_what_does_not_fit_is_refused_with_the_numbers(tiny: LocalModel) -> None:
    long = Prompt("tiny", [user("x" * 100)], options={"max_tokens": 8})
    assert tiny.context_tokens == CONTEXT
    assert not tiny.fits(long)
    with pytest.raises(ContextTooLong, match=r"has 1\d\d tokens and asks for 8 more, and 'tiny' takes 64 together"):
        ask(tiny, long)
    assert tiny.fits(Prompt("tiny", [user("x")], options={"max_tokens": 8}))


def test_a_cancelled_ask_stops_and_the_next_one_is_served(tiny: LocalModel) -> None:
    first = threading.Event()

    async def go() -> Answer:
        heard = asyncio.Event()
        prompt = Prompt("tiny", [user("hi")], options={"max_tokens": 30, "temperature": 3.0, "seed": 3})
        asked = asyncio.create_task(tiny.ask(prompt, lambda _: (first.set(), heard.set())))
        waiting = asyncio.create_task(tiny.ask(prompt))
        await heard.wait()
        waiting.cancel()
        asked.cancel()
        done = await asyncio.gather(asked, waiting, return_exceptions=True)
        assert all(isinstance(d, asyncio.CancelledError) for d in done)
        return await tiny.ask(Prompt("tiny", [user("hi")], options={"max_tokens": 2}))

    assert asyncio.run(go()).usage.output_tokens
    assert first.is_set()


def test_many_ask_at_once_and_each_gets_its_own(tiny: LocalModel) -> None:
    prompts = [Prompt("tiny", [user(f"{i}")], options={"max_tokens": 6}) for i in range(5)]

    async def go() -> list[Answer]:
        together = await asyncio.gather(*(tiny.ask(p) for p in prompts))
        await tiny.close()
        return list(together)

    together = asyncio.run(go())
    assert [a.message for a in together] == [ask(tiny, p).message for p in prompts]
    assert max(a.usage.batch for a in together) == len(prompts)


def test_what_is_not_here_says_how_to_get_it(
    made: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMESH_CACHE", str(made[0]))
    with pytest.raises(ConfigError, match=r"local model 'org/none' is not here .*; agentmesh models pull org/none"):
        ask(LocalModel("org/none"), Prompt("org/none", [user("x")]))


# ---- tools as text -----------------------------------------------------------------------------
LOOK = ToolSpec("look", "Look.", {"type": "object", "properties": {"at": {"type": "string"}}})


def test_tools_are_told_as_text_where_the_template_has_none() -> None:
    turns = [system("Be brief."), user("Go."), Message("assistant", "", (ToolCall("c", "look", '{"at": "x"}'),))]
    turns.append(Message("tool", "a wall", tool_call_id="c"))
    messages, tools = chat_turns(Prompt("m", turns, [LOOK]), template=TEMPLATE)
    assert tools is None
    assert messages[0]["content"].startswith("Be brief.\n\nYou may call these tools:\n{")
    assert messages[2] == {
        "role": "assistant",
        "content": '<tool_call>{"name": "look", "arguments": {"at": "x"}}</tool_call>',
    }
    assert messages[3] == {"role": "user", "content": "<tool_response>\na wall\n</tool_response>"}


def test_a_template_of_this_format_is_given_the_tools() -> None:
    turns = [user("Go."), Message("assistant", "", (ToolCall("c", "look", '{"at": "x"}'),))]
    messages, tools = chat_turns(Prompt("m", turns, [LOOK]), template="{{ tools }} <tool_call>")
    assert tools is not None
    assert tools[0]["function"]["name"] == "look"
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"at": "x"}


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        ('Hm. <tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>', "Hm.", ['{"at": "x"}']),
        ('<tool_call>{"name": "look", "arguments": {}}', "", ["{}"]),
        (
            '<tool_call>{"name": "look", "arguments": {"at": "} </tool_call> {"}} </tool_call> <tool_call>{"name": 1</tool_call>',
            '<tool_call>{"name": 1</tool_call>',
            ['{"at": "} </tool_call> {"}'],
        ),
        ('<tool_call>{"name": "look"</tool_call>', '<tool_call>{"name": "look"</tool_call>', []),
        ("plain", "plain", []),
    ],
)
def test_calls_are_read_from_the_text(text: str, rest: str, calls: list[str]) -> None:
    found, asked = parse_tool_calls(text, [LOOK], turn=3)
    assert (found, [c.arguments for c in asked]) == (rest, calls)
    assert [c.id for c in asked] == [f"call_3_{i}" for i in range(len(calls))]
    assert parse_tool_calls(text, [], turn=3) == (text, ())


# ---- the real one ------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def smollm2() -> LocalModel:
    """SmolLM2 from the usual cache, pulled if it is not there; without a network a skip at home, a failure in CI."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTMESH_CACHE", HOME)
        try:
            pull("smollm2")
        except ServiceDown as e:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no SmolLM2: {e.message}")
        model = LocalModel("smollm2")
        assert model.context_tokens == 8192
        return model


def test_smollm2_speaks(smollm2: LocalModel) -> None:
    said: list[str] = []
    prompt = Prompt("smollm2", [user("What is the capital of France?")], options={"max_tokens": 24})
    answer = ask(smollm2, prompt, said)
    assert "Paris" in answer.message.text
    assert "".join(said) == answer.message.text
    assert answer.finish == "stop"
    assert answer.usage.input_tokens > 10


def test_smollm2_s_tokenizer_splits_as_it_should(smollm2: LocalModel) -> None:
    folder = Path(HOME) / "models" / "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = tokenizer("<|im_start|>user\nIn 2024, naïve café — 日本 🙂!<|im_end|>")["input_ids"]
    assert ids[0] == 1
    assert ids[-1] == 2
    assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).isdigit()] == ["2", "0", "2", "4"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nIn 2024, naïve café — 日本 🙂!<|im_end|>"
    assert AutoConfig.from_pretrained(str(folder)).rope_parameters["rope_theta"] == 100000.0


def test_a_script_on_a_local_model_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "from agentmesh import Agent, run\n\n\nclass Poet(Agent):\n    '''Writes.'''\n\n    model = 'local:tiny'\n"
        "    options = {'max_tokens': 3}\n\n\nprint(len(run(Poet(), 'hello')) > 0)\n"
    )
    env = {**os.environ, "AGENTMESH_CACHE": str(save_model(tmp_path))}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
