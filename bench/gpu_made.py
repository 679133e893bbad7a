"""A made model in a local model folder: random weights of a known shape, drawn by seed on the device, nothing downloaded."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from agentmesh.testing.tiny_models import make_tokenizer

NAME = "made"
SHAPES: dict[str, dict[str, Any]] = {
    # as Llama 3.2 has it with a billion weights
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    },
}  # fmt: skip
END = 2  # of testing.tiny's tokenizer


def made(shape: str, device: str, cache: Path) -> tuple[Any, str]:
    """Write it where `local:made` finds it when AGENTMESH_CACHE is this folder; the model itself, and what was done."""
    began, size = time.perf_counter(), SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(7)
    logging.disable_progress_bar()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(
                LlamaConfig(**size, tie_word_embeddings=True, bos_token_id=1, eos_token_id=END)
            )
    finally:
        torch.set_default_dtype(before)
    place = cache / "models" / NAME
    model.save_pretrained(place)
    bytes_of = make_tokenizer()
    make_tokenizer(words=size["vocab_size"] - len(bytes_of)).save_pretrained(place)
    (place / "agentmesh.json").write_text(json.dumps({"name": NAME, "source": "made"}))
    weights = sum(p.numel() for p in model.parameters())
    return (
        model.eval(),
        f"{weights / 1e6:.1f} million weights drawn on {device} and written in {time.perf_counter() - began:.1f} s",
    )
