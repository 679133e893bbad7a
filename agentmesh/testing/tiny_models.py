"""Models of two layers with random weights, made in milliseconds: a Llama whose tokens are bytes, a BERT whose are letters."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, CONTEXT = 300, 1024
END = 2
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(seed: int = 7, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.5,
            bos_token_id=1, eos_token_id=END,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
        return model.to(dtype).eval()


def make_tokenizer(template: str = CHATML, more: tuple[str, ...] = (), *, words: int = 0) -> Any:
    """Tokens of single bytes; `more` are added tokens that are not special, as Qwen has its tags.

    Args:
        words: how many further tokens, which no text is encoded as and a model of a larger vocabulary may generate.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, "<|im_start|>": 1, "<|im_end|>": END}
    vocabulary |= {c: i for i, c in enumerate(alphabet, 3)}
    vocabulary |= {f"\u0120word{i}": i + len(alphabet) + 3 for i in range(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(m, special=False, normalized=False) for m in more])
    fast: Any = PreTrainedTokenizerFast
    out = fast(tokenizer_object=tokenizer, eos_token="<|im_end|>", clean_up_tokenization_spaces=False)
    out.chat_template = template
    return out


def greedy_decode(model: Any, tokens: list[int], most_tokens: int) -> list[int]:
    """The tokens of plain greedy decoding, without a cache or a batch."""
    generated: list[int] = []
    with torch.inference_mode():
        for _ in range(most_tokens):
            logits = model(torch.tensor([tokens + generated], device=model.device)).logits[0, -1].float()
            generated.append(int(logits.argmax()))
    return generated


def save_model(folder: Path, template: str = CHATML, more: tuple[str, ...] = ()) -> Path:
    """The model as `agentmesh models pull` would leave it: in a cache folder under the name `tiny`."""
    place = folder / "models" / "tiny"
    make_model().save_pretrained(place)
    make_tokenizer(template, more).save_pretrained(place)
    (place / "agentmesh.json").write_text('{"name": "tiny", "source": "made"}')
    return folder


def save_encoder(folder: Path) -> Path:
    """A BERT of 32 numbers, for texts of at most 64 tokens, in a folder of its own."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), ":"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=64,
        )  # fmt: skip
        model: Any = BertModel(config)
        model.eval().save_pretrained(folder)
    tokenizer: Any = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(folder)
    return folder
