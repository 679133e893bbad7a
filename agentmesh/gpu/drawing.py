"""Drawing the next token of many requests at once: temperature, top-k, top-p, then noise that follows from each one's seed.

Noise of Gumbel's distribution is added to the scores; the largest is then a draw from their softmax, for each request alone,
whoever else is in the batch. A token's noise is a hash of seed, place and id: it is computed only for tokens that may still
come, and is the same on every device.

Letters: n requests, v ids of the vocabulary, m candidates.

Source: Gumbel-max, https://arxiv.org/abs/1611.00712 (section 3.1); top-p, https://arxiv.org/abs/1904.09751; the hash's
constants, https://github.com/skeeto/hash-prospector
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

CANDIDATES = 1024  # of the likeliest tokens, among which top-k and top-p nearly always end; else all are sorted
AT_ONCE = 1 << 22  # numbers of noise that are in memory at once
# A score divided by less could be infinite, and noise is nothing beside it already; -inf divided by inf is no number.
COLDEST, HOTTEST = 1e-9, 1e37
GOLDEN, FIRST, SECOND = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32  # as signed 32-bit numbers


class Wish(NamedTuple):
    """How one request's token is drawn.

    Args:
        temperature: above 0.
        top_k: the k likeliest are drawn from, and what is as likely as the last of them; 0 is all.
        top_p: the likeliest whose probabilities make up so much are drawn from, in (0, 1].
        seed, place: of the request, and of the token in its answer.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    place: int

    @property
    def key(self) -> tuple[int, int]:
        """Two signed 32-bit numbers."""
        digest = hashlib.blake2b(f"{self.seed} {self.place}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], signed=True), int.from_bytes(digest[4:], signed=True)


def noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of each token for each key.

    Args:
        keys: int32 (n, 2). ids: int32 (n, m) or (1, m).

    Returns:
        float32 (n, m).
    """
    x = ids * GOLDEN + keys[:, :1]  # (n, m); overflow wraps around
    x ^= (x >> 16) & 0xFFFF
    x *= FIRST
    x += keys[:, 1:]
    x ^= (x >> 15) & 0x1FFFF
    x *= SECOND
    x ^= (x >> 16) & 0xFFFF
    x >>= 8
    x &= 0xFFFFFF  # as many bits as a float32 holds exactly
    return x.float().add_(0.5).mul_(-(2.0**-24)).log1p_().neg_().log_().neg_()


def draw(scores: torch.Tensor, wishes: Sequence[Wish]) -> torch.Tensor:
    """The next tokens.

    Args:
        scores: (n, v); what must not come is -inf.

    Returns:
        int64 (n,).
    """
    device, v = scores.device, scores.shape[1]
    heat = torch.tensor([min(max(w.temperature, COLDEST), HOTTEST) for w in wishes], device=device)[:, None]
    scores = scores.float() / heat
    keys = torch.tensor([w.key for w in wishes], dtype=torch.int32, device=device)
    tokens = torch.empty(len(wishes), dtype=torch.int64, device=device)
    narrow = [i for i, w in enumerate(wishes) if 0 < w.top_k < v or w.top_p < 1]
    wide = sorted({*range(len(wishes))} - {*narrow})
    if narrow:
        ks = torch.tensor([min(wishes[i].top_k, v) for i in narrow], device=device)
        ps = torch.tensor([wishes[i].top_p if wishes[i].top_p < 1 else math.inf for i in narrow], device=device)
        tokens[narrow] = _of_the_likeliest(scores[narrow], keys[narrow], ks, ps, CANDIDATES)
    ids = torch.arange(v, dtype=torch.int32, device=device)[None]
    rows = max(1, AT_ONCE // v)
    for first in range(0, len(wide), rows):
        some = wide[first : first + rows]
        tokens[some] = (scores[some] + noise(keys[some], ids)).argmax(1)
    return tokens


def _of_the_likeliest(
    scores: torch.Tensor, keys: torch.Tensor, ks: torch.Tensor, ps: torch.Tensor, candidates: int
) -> torch.Tensor:
    """`draw` under top-k and top-p. What is as likely as the last one kept is kept too, or it would depend on a sort."""
    m = min(scores.shape[1], max(candidates, int(ks.max())))
    best, ids = scores.topk(m)  # (n, m), the likeliest first
    has_k = (ks > 0)[:, None]
    kth = best.gather(1, (ks - 1).clamp_min(0)[:, None])  # (n, 1)
    best = best.masked_fill(has_k & (best < kth), -math.inf)
    total = torch.where(has_k, best.logsumexp(1, keepdim=True), scores.logsumexp(1, keepdim=True))
    shares = (best - total).exp()
    inside = shares.cumsum(1) - shares < ps[:, None]  # what comes before it does not yet make up top_p
    inside[:, 0] = True
    last = best.masked_fill(~inside, math.inf).amin(1, keepdim=True)
    kept = best >= last
    tokens = ids.gather(1, (best + noise(keys, ids.int())).masked_fill(~kept, -math.inf).argmax(1, keepdim=True))[:, 0]
    more = (kept[:, -1] & (best[:, -1] > -math.inf)).nonzero()[:, 0]  # what is kept goes on behind the candidates
    if m < scores.shape[1] and len(more):
        tokens[more] = _of_the_likeliest(scores[more], keys[more], ks[more], ps[more], scores.shape[1])
    return tokens
