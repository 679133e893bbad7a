"""A kernel on trial: on random requests of a model's own head shapes, does it say what the plain formula says?

Letters as in `attention.py`; p pages of t tokens, n requests.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from agentmesh.gpu.attention import plain

BLOCK_TOKENS = 256  # a page that flash attention reads by itself holds a multiple of so many tokens
# How far a kernel may be from the formula. Values are around 1, a wrong mask or scale is off by as much.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
STEEP = 1.7  # the check's scores are scaled by so much more than usual: one key too many is seen at once
LONGEST_WHY = 200
WINDOW = 16  # of the check, where the model has any
# new and seen tokens of the check's requests: prompts, parts of prompts behind cached ones, one token behind many
MIXED = ((1, 1), (1, 37), (5, 5), (17, 40), (1, 130), (70, 200), (130, 130))
LONE = ((1, 1), (1, 37), (1, 130), (1, 300))


class Heads(NamedTuple):
    """What of a model an attention kernel sees.

    Args:
        window: 0 where no layer has one.
        softcap: 0.0 where scores are not capped.
    """

    heads: int
    groups: int
    width: int
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @classmethod
    def of(cls, model: Any) -> "Heads":
        """Those of a model of transformers."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            heads, getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            getattr(config, "sliding_window", None) or 0, getattr(config, "attn_logit_softcapping", None) or 0.0,
            any("sink" in name for name, _ in model.named_parameters()),
        )  # fmt: skip


class Kernel(NamedTuple):
    """An attention function of transformers' interface.

    Args:
        name: transformers knows it by this, or will.
        pages: it may also read and write the cache's pages itself (`flash_attn_with_kvcache`).
    """

    name: str
    attend: Callable[..., tuple[torch.Tensor, Any]]
    pages: bool = False


def difference(kernel: Kernel, heads: Heads, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with a kernel for such heads on this device; "" where it does what the formula says."""
    windows = [None, min(heads.window, WINDOW)] if heads.window else [None]
    try:
        with torch.inference_mode():
            for window, lengths in itertools.product(windows, (MIXED, LONE)):
                sample = _Sample(heads, lengths, window, device, dtype)
                out, _ = kernel.attend(
                    _module(kernel, heads), sample.query, sample.key, sample.value, None, dropout=0.0,
                    sliding_window=window, is_causal=True, cu_seq_lens_q=sample.starts_q, cu_seq_lens_k=sample.starts_k,
                    max_length_q=max(new for new, _ in lengths), max_length_k=max(seen for _, seen in sample.lengths),
                    **sample.scores,
                )  # fmt: skip
                if fault := _compared(out, sample.expected, dtype):
                    return f"{fault} with a window of {window}" if window else fault
    except Exception as e:  # whatever a kernel does not take
        return in_short(e)
    return ""


def page_difference(kernel: Kernel, heads: Heads, page_tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    """The same for a kernel that finds lone tokens' keys in the cache's pages, and writes the new ones there."""
    if heads.window or page_tokens % BLOCK_TOKENS:
        return "the cache's pages are of another kind"
    try:
        with torch.inference_mode():
            sample = _Sample(heads, LONE, None, device, dtype)
            cache_k, cache_v, table = sample.paged(page_tokens)
            last = [start - 1 for start in sample.starts_k.tolist()[1:]]
            out, _ = kernel.attend(
                _module(kernel, heads), sample.query, sample.key[:, :, last], sample.value[:, :, last], None, dropout=0.0,
                sliding_window=None, is_causal=True, cu_seq_lens_q=sample.starts_q, cu_seq_lens_k=sample.starts_k,
                max_length_q=1, max_length_k=1, block_table=table, k_cache=cache_k, v_cache=cache_v, **sample.scores,
            )  # fmt: skip
            return _compared(out, sample.expected, dtype)
    except Exception as e:
        return in_short(e)


class _Sample:
    """Random requests, packed as the cache packs them, and what the formula says of them."""

    def __init__(
        self,
        heads: Heads,
        lengths: Sequence[tuple[int, int]],
        window: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        # a layer with a window is given no more than its new tokens can see
        self.lengths = [(new, min(seen, new + window - 1) if window else seen) for new, seen in lengths]
        draw = torch.Generator().manual_seed(1)

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw).to(device, dtype)

        news, seens = ([pair[i] for pair in self.lengths] for i in (0, 1))
        self.query = some(1, heads.heads, sum(news), heads.width)
        self.key, self.value = (some(1, heads.groups, sum(seens), heads.width) for _ in range(2))
        sinks = some(heads.heads) if heads.sinks else None
        softcap, scale = heads.softcap or None, STEEP * heads.width**-0.5
        self.scores = {"scaling": scale, "softcap": softcap, "s_aux": sinks}
        self.starts_q, self.starts_k = (
            torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in (news, seens)
        )
        packed = (self.query, news), (self.key, seens), (self.value, seens)
        parts = zip(*(torch.split(x, lengths, 2) for x, lengths in packed), strict=True)
        said = [plain(q, k, v, scale, window=window, softcap=softcap, sinks=sinks) for q, k, v in parts]
        self.expected = torch.cat(said, 2).transpose(1, 2)  # (1, q, h, e)

    def paged(self, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values but for each request's last in pages (p, t, g, e) in no order; and who has which, (n, most)."""
        counts = [-(-seen // page_tokens) for _, seen in self.lengths]
        order = random.Random(1).sample(range(sum(counts) + 2), sum(counts))
        table = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
        caches = [x.new_zeros(sum(counts) + 2, page_tokens, x.shape[1], x.shape[3]) for x in (self.key, self.value)]
        for row, ((_, seen), begin) in enumerate(zip(self.lengths, self.starts_k.tolist(), strict=False)):
            for place in range(0, seen, page_tokens):
                table[row, place // page_tokens] = page = order.pop()
                end = min(place + page_tokens, seen - 1)
                for cache, whole in zip(caches, (self.key, self.value), strict=True):
                    cache[page, : end - place] = whole[0, :, begin + place : begin + end].transpose(0, 1)
        return caches[0], caches[1], table.to(self.key.device)


def in_short(error: Exception) -> str:
    """Of what torch says about a kernel it lacks the first line is for people."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:LONGEST_WHY]}"


def _compared(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str:
    if out.shape != expected.shape:
        return f"its answer is {tuple(out.shape)}, not {tuple(expected.shape)}"
    off = float((out.float() - expected).abs().max())  # waits for the device: its errors are heard here
    return "" if off <= TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) else f"it is off by {off:.2g}"


def _module(kernel: Kernel, heads: Heads) -> Any:
    """What transformers' functions ask of the layer they are called for."""
    config = SimpleNamespace(_attn_implementation=kernel.name)
    return SimpleNamespace(
        config=config, is_causal=True, training=False, num_key_value_groups=heads.heads // heads.groups
    )
