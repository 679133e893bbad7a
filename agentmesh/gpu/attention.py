"""Attention over the paged cache, one request at a time: on a CPU a mask over everybody's keys costs more than the model.

Letters: h heads, g heads of keys and values, q new tokens of all requests, k cached and new tokens of all, e head width.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "agentmesh_paged"


def paged_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Each request's new tokens look at its own keys alone.

    Args:
        query: (1, h, q, e). key, value: (1, g, k, e), request after request.
        cu_seq_lens_q, cu_seq_lens_k: (n + 1), where each request begins in q and in k.

    Returns:
        (1, q, h, e), and no weights.
    """
    if rest.get("softcap") is not None or rest.get("s_aux") is not None:
        raise NotImplementedError("this attention knows neither softcap nor sinks")
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    out = torch.empty_like(query)  # (1, h, q, e)
    # float32: with bfloat16 a CPU compiles a kernel for each new length, 150 ms a time
    query, key, value = query.float(), key.float(), value.float()
    starts_q, starts_k = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
    for i in range(len(starts_q) - 1):
        q = slice(starts_q[i], starts_q[i + 1])
        k = slice(starts_k[i], starts_k[i + 1])
        out[:, :, q] = _one(query[:, :, q], key[:, :, k], value[:, :, k], scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def _one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Of one request; (1, h, new, e)."""
    attend = torch.nn.functional.scaled_dot_product_attention
    _, heads, new, width = query.shape
    groups, seen = key.shape[1], key.shape[2]
    if new == 1:  # the heads of a group are as tokens that all see everything
        return attend(query.view(1, groups, heads // groups, width), key, value, scale=scaling).view(query.shape)
    mask = _mask(new, seen, window)
    return attend(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=heads != groups)


def _mask(new: int, seen: int, window: int | None) -> torch.Tensor:
    """Each new token sees what is before it and itself, at most `window` of them; bool (new, seen)."""
    mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
    return mask if window is None else mask.triu(seen - new - window + 1)


def register() -> None:
    """Make it known to transformers under NAME."""
    AttentionInterface.register(NAME, paged_attention)
