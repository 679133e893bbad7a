"""Which attention the engine uses on its device. Each is tried against the plain formula first, on the model's own head
shapes: one that raises or says something else is passed over, so that a wrong guess about a kernel costs time, not tokens.

Letters as in `attention.py`.
"""

import logging
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from agentmesh.errors import ConfigError
from agentmesh.gpu.attention import NAME, paged_attention, refuse_unknown
from agentmesh.gpu.trial import Heads, Kernel, difference, in_short, page_difference

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

log = logging.getLogger("agentmesh.gpu")

VARLEN = "agentmesh_varlen"


class Choice(NamedTuple):
    """What was found. `pages`: lone tokens go through the kernel that reads the cache itself."""

    name: str
    pages: bool = False


def varlen_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None, max_length_q: int = 0, max_length_k: int = 0, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """torch's own flash attention over packed requests; what it does not know goes to `paged_attention`.

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
    """Those there are for a device, the best first; the last one always works."""
    ours = Kernel(NAME, paged_attention)
    if device.type != "cuda":
        return [ours]
    wheels = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    found = [Kernel(name, flash_attention_forward, pages=True) for name, there in wheels.items() if there()]
    found += [Kernel(VARLEN, varlen_attention)] if varlen_attn is not None else []
    return [*found, ours]


def choose(model: Any, page_tokens: int, wish: str = "") -> Choice:
    """Give a model the best attention that passes the check, once; the log says which, and why no better one.

    Args:
        wish: a name, taken as it is: for comparisons.

    Raises:
        ConfigError: none passes.
    """
    known: dict[tuple[str, int], Choice] = model.__dict__.setdefault("_agentmesh_attention", {})
    if (choice := known.get((wish, page_tokens))) is not None:
        model.set_attn_implementation(choice.name)
        return choice
    heads, why = Heads.of(model), list[str]()
    for kernel in kernels(model.device):
        if wish and kernel.name != wish:
            continue
        fault = "" if wish else _unfit(model, kernel) or difference(kernel, heads, model.device, model.dtype)
        if not fault:
            fault = _set(model, kernel)
        if fault:
            why.append(f"{kernel.name}: {fault}")
            continue
        pages = kernel.pages and not page_difference(kernel, heads, page_tokens, model.device, model.dtype)
        known[wish, page_tokens] = choice = Choice(kernel.name, pages)
        log.info(
            "attention: %s%s%s", kernel.name, " with pages" if pages else "", f" ({'; '.join(why)})" if why else ""
        )
        return choice
    if wish:
        model.set_attn_implementation(wish)
        return Choice(wish)
    raise ConfigError(
        f"no attention works on {model.device} in {model.dtype} ({'; '.join(why)}); install a torch that is built for this "
        "device, or put a server behind the queue (url=)"
    )


def _unfit(model: Any, kernel: Kernel) -> str:
    """A wheel that the model is not made for: transformers would look for another one on a hub."""
    if not kernel.pages:
        return ""
    wanted = getattr(model, "_compatible_flash_implementations", None)
    if not model._supports_flash_attn or (wanted is not None and kernel.name not in wanted):
        return "the model is not made for it"
    return ""


def _set(model: Any, kernel: Kernel) -> str:
    """Why the model does not take it; "" when it has."""
    if not kernel.pages:
        AttentionInterface.register(kernel.name, kernel.attend)
    try:
        model.set_attn_implementation(kernel.name)
    except Exception as e:
        return in_short(e)
    has = model.config._attn_implementation
    return "" if has == kernel.name else f"the model keeps {has}"
