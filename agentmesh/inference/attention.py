"""Attention over the paged cache, one request at a time: one mask over all requests' keys would cost more than the model.

Letters: h heads, g heads of keys and values, q new tokens of all requests, k cached and new tokens of all, e head width.
"""

import math
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PAGED_NAME = "agentmesh_paged"
MAX_SCORES = 2**24  # of one request that are in memory at once, 64 MiB a copy
UNSUPPORTED = ("position_bias", "sinks", "block_indices")  # arguments by which other kinds of model change the scores


def paged_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: torch.Tensor | None = None, cu_seq_lens_q: Any = None, cu_seq_lens_k: Any = None, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of packed requests: the new tokens of each attend only to the keys of the same request.

    Args:
        query: (1, h, q, e). key, value: (1, g, k, e), request after request.
        softcap: the bound of the scores, by a tanh. s_aux: (h), an attention sink for each head.
        cu_seq_lens_q, cu_seq_lens_k: (n + 1), where each request begins in q and in k.

    Returns:
        (1, q, h, e), and None in place of the attention weights.

    Raises:
        NotImplementedError: the model changes its scores in another way.
    """
    refuse_unknown(rest)
    if cu_seq_lens_q is None:
        if softcap is not None or s_aux is not None:
            raise NotImplementedError("outside the engine this attention supports neither softcap nor sinks")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    out = torch.empty_like(query)  # (1, h, q, e)
    if query.device.type == "cpu":  # with bfloat16 a CPU compiles a kernel for each new length, which takes 150 ms
        query, key, value = query.float(), key.float(), value.float()
    starts_q, starts_k = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
    is_chunked = softcap is not None or s_aux is not None
    for i in range(len(starts_q) - 1):
        q = slice(starts_q[i], starts_q[i + 1])
        k = slice(starts_k[i], starts_k[i + 1])
        one = query[:, :, q], key[:, :, k], value[:, :, k]
        if is_chunked:
            out[:, :, q] = _chunked_attention(*one, scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
        else:
            out[:, :, q] = _attend_one(*one, scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def reference_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None, *,
    window: int | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The formula in float32 for one request: the reference that every kernel is compared with.

    Source: softcap https://arxiv.org/abs/2408.00118, sinks https://arxiv.org/abs/2508.10925

    Args:
        query: (1, h, new, e). key, value: (1, g, seen, e), the new ones last.
        window: how many keys a token attends to at most, its own included.
        sinks: (h), the score of one more key, whose value is zero.

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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, **options: Any
) -> torch.Tensor:
    """The formula for a few new tokens at a time, so that their scores need little memory; (1, h, new, e)."""
    _, heads, new, _ = query.shape
    before, step = key.shape[2] - new, max(1, MAX_SCORES // (heads * key.shape[2]))
    parts = []
    for i in range(0, new, step):
        end = min(i + step, new)
        seen = slice(before + end)  # these tokens must not attend to later ones
        parts.append(reference_attention(query[:, :, i:end], key[:, :, seen], value[:, :, seen], scaling, **options))
    return torch.cat(parts, 2)


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """Refuse arguments that change the scores and are not supported here, rather than ignore them."""
    for name in UNSUPPORTED:
        if arguments.get(name) is not None:
            raise NotImplementedError(
                f"the engine's attention does not support {name}: use a ServerQueue for this model"
            )


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one request by torch's own kernels; (1, h, new, e)."""
    attend = torch.nn.functional.scaled_dot_product_attention
    _, heads, new, width = query.shape
    groups, seen = key.shape[1], key.shape[2]
    if new == 1 and (window is None or seen <= window):  # the heads of a group act as tokens that attend to every key
        return attend(query.view(1, groups, heads // groups, width), key, value, scale=scaling).view(query.shape)
    mask = _mask(new, seen, window, query.device)
    return attend(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=heads != groups)


def _mask(new: int, seen: int, window: int | None, device: torch.device) -> torch.Tensor:
    """A causal mask: each new token attends to itself and to earlier ones, at most `window` in all; bool (new, seen)."""
    mask = torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)
    return mask if window is None else mask.triu(seen - new - window + 1)
