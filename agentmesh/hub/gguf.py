"""Converts a Llama-shaped GGUF file to a folder for transformers: weights dequantised, rotary order undone, tokenizer rebuilt.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

from agentmesh.errors import ConfigError

Progress = Callable[[str, int, int], None]
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3  # GGUF's token type of special tokens


def convert(gguf: Path, folder: Path, *, progress: Progress | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into `folder`.

    Raises:
        ConfigError: the model is not a Llama, or its tokenizer is not byte-level BPE.
    """
    reader = GGUFReader(str(gguf))
    about = _Metadata(reader)
    if about("general.architecture") != "llama":
        raise ConfigError(
            f"{gguf.name} holds a {about('general.architecture')!r} model, and only Llama-shaped ones are converted",
            hint="pull the model's safetensors, or serve the file with llama-server and a ServerQueue",
        )
    heads, kv_heads = about("llama.attention.head_count"), about("llama.attention.head_count_kv")
    weights: dict[str, torch.Tensor] = {}
    for i, tensor in enumerate(reader.tensors):
        name = _tensor_name(tensor.name)
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            array = unpermuted(array, heads)
        elif name.endswith("k_proj.weight"):
            array = unpermuted(array, kv_heads)
        weights[name] = torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16)
        if progress is not None:
            progress("converting", i + 1, len(reader.tensors))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tied = "lm_head.weight" not in weights
    (folder / "config.json").write_text(json.dumps(_config(about, tied=tied), indent=1))
    _tokenizer(about, folder)


class _Metadata:
    """A GGUF file's key-value pairs as Python values."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def __call__(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()


def _tensor_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{BLOCK_TENSORS[part]}.{kind}"
    return f"{TENSORS[stem]}.{kind}"


def unpermuted(weight: Any, heads: int) -> Any:
    """Reorder rows from GGUF's rotary layout (pairs side by side) to transformers' (halves): (h*d, e) -> (h*d, e)."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)  # (h, d/2, 2, e)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _config(about: _Metadata, *, tied: bool) -> dict[str, Any]:
    heads = about("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": about("llama.embedding_length"),
        "intermediate_size": about("llama.feed_forward_length"),
        "num_hidden_layers": about("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": about("llama.attention.head_count_kv", heads),
        "max_position_embeddings": about("llama.context_length"),
        "rms_norm_eps": about("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": about("llama.rope.freq_base", 10000.0),
        "vocab_size": len(about("tokenizer.ggml.tokens")),
        "bos_token_id": about("tokenizer.ggml.bos_token_id"),
        "eos_token_id": about("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def _tokenizer(about: _Metadata, folder: Path) -> None:
    """Write tokenizer.json: a byte-level BPE tokenizer in the format of the `tokenizers` library."""
    tokens, types = about("tokenizer.ggml.tokens"), about("tokenizer.ggml.token_type")
    if about("tokenizer.ggml.model") != "gpt2":
        raise ConfigError(
            f"the tokenizer of the GGUF file is {about('tokenizer.ggml.model')!r}, and only byte-level BPE is converted",
            hint="pull the model's safetensors",
        )
    special = [i for i, kind in enumerate(types) if kind == CONTROL_TOKEN]
    added = [
        {
            "id": i,
            "content": tokens[i],
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i in special
    ]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": about("tokenizer.ggml.merges"),
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    _tokenizer_config(about, folder)


def _tokenizer_config(about: _Metadata, folder: Path) -> None:
    """Write tokenizer_config.json: special tokens and chat template."""
    tokens = about("tokenizer.ggml.tokens")
    special = {
        kind: tokens[i] for kind in ("bos", "eos") if (i := about(f"tokenizer.ggml.{kind}_token_id")) is not None
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": about("llama.context_length"),
        "chat_template": about("tokenizer.chat_template", ""),
        "clean_up_tokenization_spaces": False,
        **{f"{kind}_token": token for kind, token in special.items()},
        "pad_token": special.get("eos"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
