"""Attention over the paged cache, one request at a time: a mask over everybody's keys would cost more than the model.

Letters: h heads, g heads of keys and values, q new tokens of all requests, k cached and new tokens of all, e head width.
"""

import math
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PAGED_NAME = "agentmesh_paged"
MAX_SCORES = 2**24  # of one request that are in memory at once, 64 MiB a copy
UNSUPPORTED = ("position_bias", "sinks", "block_indices")  # what models of other kinds add to or take from the scores


def paged_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: torch.Tensor | None = None, cu_seq_lens_q: Any = None, cu_seq_lens_k: Any = None, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Each request's new tokens look at its own keys alone.

    Args:
        query: (1, h, q, e). key, value: (1, g, k, e), request after request.
        softcap: scores are kept within it by a tanh. s_aux: (h), an attention sink for each head.
        cu_seq_lens_q, cu_seq_lens_k: (n + 1), where each request begins in q and in k.

    Returns:
        (1, q, h, e), and no weights.

    Raises:
        NotImplementedError: the model does something else to its scores.
    """
    refuse_unknown(rest)
    if cu_seq_lens_q is None:
        if softcap is not None or s_aux is not None:
            raise NotImplementedError("outside the engine this attention knows neither softcap nor sinks")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    out = torch.empty_like(query)  # (1, h, q, e)
    if query.device.type == "cpu":  # with bfloat16 a CPU compiles a kernel for each new length, 150 ms a time
        query, key, value = query.float(), key.float(), value.float()
    starts_q, starts_k = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
    odd = softcap is not None or s_aux is not None
    for i in range(len(starts_q) - 1):
        q = slice(starts_q[i], starts_q[i + 1])
        k = slice(starts_k[i], starts_k[i + 1])
        one = query[:, :, q], key[:, :, k], value[:, :, k]
        if odd:
            out[:, :, q] = _chunked_attention(*one, scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
        else:
            out[:, :, q] = _attend_one(*one, scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def reference_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None, *,
    window: int | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The formula itself, in float32, of one request: what every kernel must agree with.

    Source: softcap https://arxiv.org/abs/2408.00118, sinks https://arxiv.org/abs/2508.10925

    Args:
        query: (1, h, new, e). key, value: (1, g, seen, e), the new ones last.
        window: how many keys a token sees at most, its own among them.
        sinks: (h), the score of one more key, whose value is nothing.

    Returns:
        (1, h, new, e).
    """
    _, heads, new, width = query.shape
    groups, seen = key.shape[1], key.shape[2]
    key, value = (x.float().repeat_interleave(heads // groups, 1) for x in (key, value))
    # (1, h, new, e) x (1, h, e, seen) -> (1, h, new, seen)
    scores = query.float() @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_mask(new, seen, window, query.device), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, heads, 1, 1).expand(1, heads, new, 1)], -1)
    return scores.softmax(-1)[..., :seen] @ value


def _chunked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, **how: Any
) -> torch.Tensor:
    """The formula, so many new tokens at a time that their scores need little memory; (1, h, new, e)."""
    _, heads, new, _ = query.shape
    before, step = key.shape[2] - new, max(1, MAX_SCORES // (heads * key.shape[2]))
    parts = []
    for i in range(0, new, step):
        end = min(i + step, new)
        seen = slice(before + end)  # what comes after is not for these
        parts.append(reference_attention(query[:, :, i:end], key[:, :, seen], value[:, :, seen], scaling, **how))
    return torch.cat(parts, 2)


def refuse_unknown(given: dict[str, Any]) -> None:
    """An argument that changes scores and is not known here must not be overlooked."""
    for name in UNSUPPORTED:
        if given.get(name) is not None:
            raise NotImplementedError(f"the engine's attention knows no {name}; write a ServerQueue for this model")


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Of one request; (1, h, new, e)."""
    attend = torch.nn.functional.scaled_dot_product_attention
    _, heads, new, width = query.shape
    groups, seen = key.shape[1], key.shape[2]
    if new == 1 and (window is None or seen <= window):  # the heads of a group are as tokens that all see everything
        return attend(query.view(1, groups, heads // groups, width), key, value, scale=scaling).view(query.shape)
    mask = _mask(new, seen, window, query.device)
    return attend(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=heads != groups)


def _mask(new: int, seen: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Each new token sees what is before it and itself, at most `window` of them; bool (new, seen)."""
    mask = torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)
    return mask if window is None else mask.triu(seen - new - window + 1)
