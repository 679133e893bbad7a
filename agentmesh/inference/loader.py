"""Loads a model folder onto a device, with its tokenizer, grammars and engine."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from agentmesh.errors import ConfigError
from agentmesh.inference.batching import Shape
from agentmesh.inference.device import best_dtype
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.grammar import Grammars
from agentmesh.inference.tokenization import special_tokens

_LOADING = threading.Lock()  # transformers' loader is not thread-safe


class Loaded(NamedTuple):
    """A loaded model with what a request needs.

    Args:
        ends: ids of the tokens that end an answer.
        takes_system: whether the chat template renders a system message.
        special_tokens: their texts, which a message may hold as plain text.
    """

    engine: InferenceEngine
    tokenizer: Any
    grammars: Grammars
    ends: frozenset[int]
    context_tokens: int
    takes_system: bool
    special_tokens: tuple[str, ...] = ()


def load_model(
    folder: Path, name: str, shape: Shape | None = None, *, on_fatal: Callable[[Exception], None] | None = None
) -> Loaded:
    """Load the model of a folder and make its engine.

    Raises:
        ConfigError: the files are damaged, or the model has no chat template.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _LOADING:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, dtype=best_dtype(device)
            )
        except Exception as e:  # a damaged file raises whatever its reader raises
            raise ConfigError(
                f"local model {name!r} of {str(folder)!r} cannot be loaded ({type(e).__name__}: {e})",
                hint=f"pull it again: agentmesh models rm {name}, then agentmesh models pull {name}",
            ) from None
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model {name!r} has no chat template", hint="choose a model that was trained to chat (-Instruct)"
        )
    model = model.to(device).eval()
    engine = InferenceEngine(model, shape, on_fatal=on_fatal)
    eos = model.generation_config.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    return Loaded(
        engine, tokenizer, Grammars(tokenizer, engine.room.vocabulary, ends), frozenset(ends), engine.room.context_tokens,
        _takes_system(tokenizer), special_tokens(tokenizer),
    )  # fmt: skip


def _takes_system(tokenizer: Any) -> bool:
    turns = [{"role": "system", "content": "abcdefg"}, {"role": "user", "content": "hijk"}]
    try:
        return "abcdefg" in tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return False
