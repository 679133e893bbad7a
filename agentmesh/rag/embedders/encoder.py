"""A transformers encoder on this machine: BERT and its kin, E5, BGE, MiniLM. torch is imported here.

Shapes: b texts in a batch, t tokens of the longest, d the width.
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from agentmesh.errors import ConfigError, EmbedderError, ExtraMissing
from agentmesh.hub.cache import is_installed, model_folder
from agentmesh.inference.device import (  # whose package sets how OpenMP's threads wait, before torch is imported
    DeviceLock,
    best_dtype,
    breaks_device,
    lock_of,
)
from agentmesh.rag.embedders.base import BaseEmbedder, Floats, trained_prefixes

try:
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging
except ImportError as e:
    raise ExtraMissing(
        f"a local encoder needs {e.name}, which is not installed", hint="run: pip install 'agentmesh-celery[local,rag]'"
    ) from None

BATCH_TOKENS = 4096  # padding included; sorted batches of 2,048 to 4,096 were the fastest (mixed lengths, two threads)
MIN_BATCH_TOKENS = 256  # of a batch beside an engine, however short its steps are
DEFAULT_MAX_TOKENS = 512  # of a text, where the model does not say
TOKENIZED_TEXTS = 4096  # at a time
POOLINGS = ("mean", "cls", "lasttoken")
RATE_WEIGHT = 0.2  # of the last batch in the running mean of tokens a second


class Encoder(BaseEmbedder):
    """Vectors of a transformers encoder; bf16 where the processor has it, pooled in fp32.

    Args:
        model: a folder, a model of agentmesh's cache, or a name in the hub's own cache. Nothing is downloaded.
        pooling: mean, cls or lasttoken; what the model's folder says when left out, else mean.
        prefixes: before a query and before a document; what the folder or the name says when left out.
        device: as torch names it; a GPU where there is one when left out.

    Beside an engine on the same device each batch waits for its turn, and takes about as long as a step.

    Raises:
        ConfigError: the model is not installed, or is not a plain encoder.
    """

    def __init__(
        self, model: str, *, pooling: str | None = None, prefixes: tuple[str, str] | None = None, device: str = ""
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.name = f"local:{model}"
        self._path = _model_path(model)
        self.pooling = pooling or _declared_pooling(self._path)
        if self.pooling not in POOLINGS:
            raise ConfigError(
                f"{model!r} pools by {self.pooling!r}", hint=f"choose an encoder that pools by {', '.join(POOLINGS)}"
            )
        self.prefixes = prefixes or _declared_prefixes(self._path, model)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._parts: tuple[Any, Any, int] | None = None
        self._rate = 0.0  # tokens a second of a batch, padding included
        self.on_fatal: Callable[[Exception], None] | None = None

    def prepare(self, *, on_fatal: Callable[[Exception], None] | None = None) -> None:
        """Load it for a worker and embed its largest batch, so that an engine beside it leaves that memory free.

        Args:
            on_fatal: called when the device is broken and the process must end.

        Raises:
            ConfigError: it is not installed, is damaged, or does not fit into memory.
        """
        self.on_fatal = on_fatal
        try:
            tokenizer, model, longest = self._loaded()
            device, pad, before = model.device, tokenizer.pad_token_id or 0, 0
            if device.type == "cuda":
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
            for _ in range(2):  # the first one is slow; the second says how fast they are
                self._rate = 0.0
                self._forward(model, [[pad] * longest] * max(1, BATCH_TOKENS // longest), pad)
            if device.type == "cuda":
                lock_of(str(device)).reserved_bytes = torch.cuda.max_memory_allocated(device) - before
        except torch.OutOfMemoryError as e:
            raise ConfigError(
                f"not enough memory on the device for {self.name!r} ({e})", hint="use a smaller one"
            ) from None

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        tokenizer, _, _ = self._loaded()
        with self._lock:
            return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _loaded(self) -> tuple[Any, Any, int]:
        with self._lock:
            if self._parts is None:
                transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
                try:
                    tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True)
                    model = AutoModel.from_pretrained(
                        self._path, local_files_only=True, use_safetensors=True, dtype=_dtype(self._device)
                    )
                except (OSError, ValueError) as e:
                    first = str(e).splitlines()[0] if str(e) else type(e).__name__
                    raise ConfigError(
                        f"{self.name!r} cannot be loaded ({first})",
                        hint="name a folder with a model, or download one: agentmesh models pull ORG/MODEL",
                    ) from None
                if tokenizer.pad_token is None:
                    tokenizer.pad_token = tokenizer.eos_token
                tokenizer.padding_side = "right"  # pooling assumes it
                self._parts = tokenizer, model.to(self._device).eval(), _max_tokens(self._path, tokenizer, model)
            return self._parts

    def embed(self, texts: list[str]) -> Any:
        """See BaseEmbedder."""
        tokenizer, model, longest = self._loaded()
        out: Floats | None = None
        for first in range(0, len(texts), TOKENIZED_TEXTS):
            piece = texts[first : first + TOKENIZED_TEXTS]
            with self._lock:  # a fast tokenizer's truncation is a setting of the object
                tokens = tokenizer(piece, truncation=True, max_length=longest)["input_ids"]
            for batch in _batches([len(t) for t in tokens], partial(self._batch_tokens, lock_of(str(model.device)))):
                vectors = self._forward_or_halves(model, [tokens[i] for i in batch], tokenizer.pad_token_id or 0)
                if out is None:
                    out = np.empty((len(texts), vectors.shape[1]), np.float32)
                out[[first + i for i in batch]] = vectors
        return out

    def _batch_tokens(self, lock: DeviceLock) -> int:
        """How many tokens the next batch may have."""
        step_s = lock.step_s
        return min(BATCH_TOKENS, max(MIN_BATCH_TOKENS, int(step_s * self._rate))) if step_s else BATCH_TOKENS

    def _forward_or_halves(self, model: Any, tokens: list[list[int]], pad: int) -> Floats:
        """`_forward`, in halves where the device has no memory for it."""
        try:
            return self._forward(model, tokens, pad)
        except torch.OutOfMemoryError as e:
            if len(tokens) == 1:
                raise EmbedderError(
                    f"{self.name!r}: not enough memory for a text of {len(tokens[0])} tokens ({e})",
                    hint="cut it shorter, or use a smaller encoder",
                ) from None
        except RuntimeError as e:
            if self.on_fatal is not None and breaks_device(e):
                self.on_fatal(e)
            raise
        half = len(tokens) // 2
        return np.concatenate([self._forward_or_halves(model, some, pad) for some in (tokens[:half], tokens[half:])])

    def _forward(self, model: Any, tokens: list[list[int]], pad: int) -> Floats:
        lengths = torch.tensor([len(t) for t in tokens])
        if not int(lengths.min()):
            raise EmbedderError(f"a text has no token for {self.name!r}", hint="leave empty texts out")
        ids = torch.full((len(tokens), int(lengths.max())), pad)  # (b, t)
        for row, one in zip(ids, tokens, strict=True):
            row[: len(one)] = torch.tensor(one)
        mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]  # (b, t)
        with lock_of(str(model.device)).batch(), torch.inference_mode():
            began = time.perf_counter()
            ids, mask, lengths = (x.to(self._device) for x in (ids, mask, lengths))
            hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()  # (b, t, d)
            if self.pooling == "cls":
                pooled = hidden[:, 0]  # (b, d)
            elif self.pooling == "lasttoken":
                pooled = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]  # (b, d)
            else:
                pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]  # (b, t, d) -> (b, d)
            vectors: Floats = pooled.cpu().numpy()
            rate = ids.numel() / (time.perf_counter() - began)
        self._rate += (rate - self._rate) * (RATE_WEIGHT if self._rate else 1)
        return vectors

    def describe(self) -> dict[str, str]:
        """See BaseEmbedder."""
        revision = _read(Path(self._path) / "agentmesh.json").get("source", "") if Path(self._path).is_dir() else ""
        return {"name": self.name, "revision": str(revision), "pooling": self.pooling}


def _model_path(model: str) -> str:
    if not model:
        raise ConfigError("the embedder 'local:' names no model", hint="write it like 'local:intfloat/e5-small-v2'")
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser())
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(
            f"there is no folder {model!r} with an encoder",
            hint="name a folder, or a model such as 'intfloat/e5-small-v2'",
        )
    return str(model_folder(model)) if is_installed(model) else model


def _batches(lengths: list[int], max_tokens: Callable[[], int]) -> Iterator[list[int]]:
    """Positions of texts, the longest first: what does not fit into memory fails at once, and little is padded."""
    batch: list[int] = []
    limit = max_tokens()
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > limit:
            yield batch
            batch, limit = [], max_tokens()
        batch.append(i)
    if batch:
        yield batch


def _dtype(device: str) -> torch.dtype:
    if device != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return best_dtype(device)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _declared_pooling(path: str) -> str:
    """The pooling in sentence-transformers' file, else mean."""
    config = _read(Path(path) / "1_Pooling" / "config.json")
    if modes := [k for k, v in config.items() if k.startswith("pooling_mode_") and v is True]:
        name = "+".join(m.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for m in modes)
        return "lasttoken" if name == "last" else name
    return "mean"


def _declared_prefixes(path: str, name: str) -> tuple[str, str]:
    prompts = _read(Path(path) / "config_sentence_transformers.json").get("prompts") or {}
    if isinstance(prompts, dict) and (query := prompts.get("query")):
        return str(query), str(prompts.get("document") or prompts.get("passage") or "")
    return trained_prefixes(name)


def _max_tokens(path: str, tokenizer: Any, model: Any) -> int:
    declared = _read(Path(path) / "sentence_bert_config.json").get("max_seq_length")
    limits = [declared, tokenizer.model_max_length]
    if positions := getattr(model.config, "max_position_embeddings", None):
        offset = (
            2 if "roberta" in str(getattr(model.config, "model_type", "")) else 0
        )  # its positions begin after the padding's
        limits.append(positions - offset)
    valid = [int(x) for x in limits if isinstance(x, int) and 0 < x < 1_000_000]
    return min(valid, default=DEFAULT_MAX_TOKENS)
