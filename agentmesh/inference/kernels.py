"""The attention kernels of a device, and the check that chooses one: each is compared with the formula on random requests.

Letters as in `attention.py`; p pages of t tokens, n requests.
"""

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from agentmesh.errors import ConfigError
from agentmesh.inference.attention import PAGED_NAME, paged_attention, reference_attention, refuse_unknown
from agentmesh.inference.compat import register_attention

BLOCK_TOKENS = 256  # flash attention reads pages whose size is a multiple of so many tokens
# How far a kernel may be from the formula. Values are around 1, and a wrong mask or scale is off by about as much.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
STEEPNESS = 1.7  # factor on the check's scores: with steep ones a single key too many changes the output visibly
MAX_REASON = 200  # characters
WINDOW = 16  # keys; of the check, where a layer of the model has a window
# new and seen tokens of the check's requests: prompts, parts of prompts behind cached ones, one token behind many
MIXED_LENGTHS = ((1, 1), (1, 37), (5, 5), (17, 40), (1, 130), (70, 200), (130, 130))
LONE_LENGTHS = ((1, 1), (1, 37), (1, 130), (1, 300))


class Heads(NamedTuple):
    """The facts about a model that matter to an attention kernel.

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
        name: the name under which transformers registers it.
        pages: it may also read and write the cache's pages itself (`flash_attn_with_kvcache`).
    """

    name: str
    attend: Callable[..., tuple[torch.Tensor, Any]]
    pages: bool = False


def difference(kernel: Kernel, heads: Heads, device: torch.device, dtype: torch.dtype) -> str:
    """How a kernel differs from the formula for such heads on this device; "" where it agrees."""
    windows = [None, min(heads.window, WINDOW)] if heads.window else [None]
    try:
        with torch.inference_mode():
            for window, lengths in itertools.product(windows, (MIXED_LENGTHS, LONE_LENGTHS)):
                sample = _Sample(heads, lengths, window, device, dtype)
                out, _ = kernel.attend(
                    _fake_layer(kernel, heads), sample.query, sample.key, sample.value, None, dropout=0.0,
                    sliding_window=window, is_causal=True, cu_seq_lens_q=sample.starts_q, cu_seq_lens_k=sample.starts_k,
                    max_length_q=max(new for new, _ in lengths), max_length_k=max(seen for _, seen in sample.lengths),
                    **sample.scores,
                )  # fmt: skip
                if fault := _compare(out, sample.expected, dtype):
                    return f"{fault} with a window of {window}" if window else fault
    except Exception as e:  # a kernel may raise anything
        return error_summary(e)
    return ""


def page_difference(kernel: Kernel, heads: Heads, page_tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    """As `difference`, for a kernel that reads and writes the cache's pages itself, of requests with one new token each."""
    if heads.window or page_tokens % BLOCK_TOKENS:
        return "it cannot read the cache's pages"
    try:
        with torch.inference_mode():
            sample = _Sample(heads, LONE_LENGTHS, None, device, dtype)
            cache_k, cache_v, table = sample.paged(page_tokens)
            last = [start - 1 for start in sample.starts_k.tolist()[1:]]
            out, _ = kernel.attend(
                _fake_layer(kernel, heads), sample.query, sample.key[:, :, last], sample.value[:, :, last], None, dropout=0.0,
                sliding_window=None, is_causal=True, cu_seq_lens_q=sample.starts_q, cu_seq_lens_k=sample.starts_k,
                max_length_q=1, max_length_k=1, block_table=table, k_cache=cache_k, v_cache=cache_v, **sample.scores,
            )  # fmt: skip
            return _compare(out, sample.expected, dtype)
    except Exception as e:
        return error_summary(e)


class _Sample:
    """Random requests, packed as the cache packs them, and the formula's output for them."""

    def __init__(
        self,
        heads: Heads,
        lengths: Sequence[tuple[int, int]],
        window: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        # a layer with a window gets only the keys that its new tokens may attend to
        self.lengths = [(new, min(seen, new + window - 1) if window else seen) for new, seen in lengths]
        draw = torch.Generator().manual_seed(1)

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw).to(device, dtype)

        news, seens = ([pair[i] for pair in self.lengths] for i in (0, 1))
        self.query = some(1, heads.heads, sum(news), heads.width)
        self.key, self.value = (some(1, heads.groups, sum(seens), heads.width) for _ in range(2))
        sinks = some(heads.heads) if heads.sinks else None
        softcap, scale = heads.softcap or None, STEEPNESS * heads.width**-0.5
        self.scores = {"scaling": scale, "softcap": softcap, "s_aux": sinks}
        self.starts_q, self.starts_k = (
            torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in (news, seens)
        )
        packed = (self.query, news), (self.key, seens), (self.value, seens)
        parts = zip(*(torch.split(x, lengths, 2) for x, lengths in packed), strict=True)
        outputs = [
            reference_attention(q, k, v, scale, window=window, softcap=softcap, sinks=sinks) for q, k, v in parts
        ]
        self.expected = torch.cat(outputs, 2).transpose(1, 2)  # (1, q, h, e)

    def paged(self, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All keys and values but each request's last, in shuffled pages (p, t, g, e), and the block table (n, most pages)."""
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


def error_summary(error: Exception) -> str:
    """The type and first line of an error: torch's message about a missing kernel has many more lines."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:MAX_REASON]}"


def _compare(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str:
    if out.shape != expected.shape:
        return f"its output has the shape {tuple(out.shape)}, not {tuple(expected.shape)}"
    off = float((out.float() - expected).abs().max())  # waits for the device, whose errors are raised here
    return "" if off <= TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) else f"it is off by {off:.2g}"


def _fake_layer(kernel: Kernel, heads: Heads) -> Any:
    """An object with the attributes of a layer that transformers' attention functions read."""
    config = SimpleNamespace(_attn_implementation=kernel.name)
    return SimpleNamespace(
        config=config, is_causal=True, training=False, num_key_value_groups=heads.heads // heads.groups
    )


# ---- The choice of a kernel ------------------------------------------------------------------

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

log = logging.getLogger("agentmesh.gpu")

VARLEN_NAME = "agentmesh_varlen"


class Choice(NamedTuple):
    """A kernel that passed the check. `pages`: for requests with one new token it reads the cache's pages itself."""

    name: str
    pages: bool = False


def varlen_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None, max_length_q: int = 0, max_length_k: int = 0, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """torch's own flash attention over packed requests; what it does not support goes to `paged_attention`.

    It takes float16 and bfloat16 on CUDA from compute capability 8.0 on, and heads up to 256 wide. Its window counts the
    keys to the left of a token's own.
    """
    if rest.get("softcap") is not None or rest.get("s_aux") is not None or cu_seq_lens_q is None:
        return paged_attention(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window,
            cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, **rest,
        )  # fmt: skip
    refuse_unknown(rest)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (1, h, q, e) -> (q, h, e)
    out = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out[None], None  # (1, q, h, e)


def kernels(device: torch.device) -> list[Kernel]:
    """The kernels available for a device, the best first; the last one supports every model."""
    ours = Kernel(PAGED_NAME, paged_attention)
    if device.type != "cuda":
        return [ours]
    wheels = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    available = [
        Kernel(name, flash_attention_forward, pages=True) for name, is_installed in wheels.items() if is_installed()
    ]
    available += [Kernel(VARLEN_NAME, varlen_attention)] if varlen_attn is not None else []
    return [*available, ours]


def choose(model: Any, page_tokens: int, wish: str = "") -> Choice:
    """Set the best attention that passes the check, once for a model; log which, and why the better ones failed.

    Args:
        wish: the name of a kernel, set without the check: for comparisons.

    Raises:
        ConfigError: none passes.
    """
    choices: dict[tuple[str, int], Choice] = model.__dict__.setdefault("_agentmesh_attention", {})
    if (choice := choices.get((wish, page_tokens))) is not None:
        model.set_attn_implementation(choice.name)
        return choice
    heads, why = Heads.of(model), list[str]()
    for kernel in kernels(model.device):
        if wish and kernel.name != wish:
            continue
        fault = "" if wish else _unsuitable(model, kernel) or difference(kernel, heads, model.device, model.dtype)
        if not fault:
            fault = _set_attention(model, kernel)
        if fault:
            why.append(f"{kernel.name}: {fault}")
            continue
        pages = kernel.pages and not page_difference(kernel, heads, page_tokens, model.device, model.dtype)
        choices[wish, page_tokens] = choice = Choice(kernel.name, pages)
        log.info(
            "attention: %s%s%s", kernel.name, " with pages" if pages else "", f" ({'; '.join(why)})" if why else ""
        )
        return choice
    if wish:
        model.set_attn_implementation(wish)
        return Choice(wish)
    raise ConfigError(
        f"no attention works on {model.device} in {model.dtype} ({'; '.join(why)})",
        hint="install a torch that is built for this device, or write a ServerQueue for the model",
    )


def _unsuitable(model: Any, kernel: Kernel) -> str:
    """Why a wheel does not suit the model, for which transformers would download another one; "" where it does."""
    if not kernel.pages:
        return ""
    compatible = getattr(model, "_compatible_flash_implementations", None)
    if not model._supports_flash_attn or (compatible is not None and kernel.name not in compatible):
        return "the model does not support it"
    return ""


def _set_attention(model: Any, kernel: Kernel) -> str:
    """Set the model's attention; why it was refused, or ""."""
    if not kernel.pages:
        register_attention(kernel.name, kernel.attend)
    try:
        model.set_attn_implementation(kernel.name)
    except Exception as e:
        return error_summary(e)
    has = model.config._attn_implementation
    return "" if has == kernel.name else f"the model keeps {has}"
