"""Drawing the next token of many requests at once: temperature, top-k, top-p, then noise that follows from each one's seed.

Noise of Gumbel's distribution is added to the scores; the largest sum is then a draw from their softmax, for each request
alone, whatever else is in the batch. A token's noise is a hash of seed, place and id: it is computed only for tokens that may
still come, and is the same on every device.

Letters: n requests, v ids of the vocabulary, m candidates.

Source: Gumbel-max, https://arxiv.org/abs/1611.00712 (section 3.1); top-p, https://arxiv.org/abs/1904.09751; the hash's
constants, https://github.com/skeeto/hash-prospector
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from agentmesh.inference.request import Gauge, InferenceRequest

CANDIDATES = 1024  # the likeliest tokens, among which top-k and top-p nearly always end; else all are sorted
MAX_ELEMENTS = 1 << 22  # of noise in memory at once
# A score divided by less could be infinite, and noise is nothing beside it already; -inf divided by inf is NaN.
COLDEST, HOTTEST = 1e-9, 1e37
GOLDEN, FIRST, SECOND = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32  # as signed 32-bit numbers


class DrawOptions(NamedTuple):
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


def draw(scores: torch.Tensor, options: Sequence[DrawOptions]) -> torch.Tensor:
    """The next tokens.

    Args:
        scores: (n, v); a token that must not come has -inf.
        options: n of them.

    Returns:
        int64 (n,).
    """
    device, v = scores.device, scores.shape[1]
    temperatures = torch.tensor([min(max(o.temperature, COLDEST), HOTTEST) for o in options], device=device)
    scores = scores.float() / temperatures[:, None]  # (n, v)
    keys = torch.tensor([o.key for o in options], dtype=torch.int32, device=device)  # (n, 2)
    tokens = torch.empty(len(options), dtype=torch.int64, device=device)
    truncated = [i for i, o in enumerate(options) if 0 < o.top_k < v or o.top_p < 1]
    full = sorted({*range(len(options))} - {*truncated})
    if truncated:
        ks = torch.tensor([min(options[i].top_k, v) for i in truncated], device=device)
        ps = torch.tensor([options[i].top_p if options[i].top_p < 1 else math.inf for i in truncated], device=device)
        tokens[truncated] = _draw_truncated(scores[truncated], keys[truncated], ks, ps, CANDIDATES)
    ids = torch.arange(v, dtype=torch.int32, device=device)[None]  # (1, v)
    rows = max(1, MAX_ELEMENTS // v)
    for first in range(0, len(full), rows):
        chunk = full[first : first + rows]
        tokens[chunk] = (scores[chunk] + noise(keys[chunk], ids)).argmax(1)  # (chunk, v) -> (chunk,)
    return tokens


def _draw_truncated(
    scores: torch.Tensor, keys: torch.Tensor, ks: torch.Tensor, ps: torch.Tensor, candidates: int
) -> torch.Tensor:
    """`draw` under top-k and top-p. What is as likely as the last one kept is kept too, or it would depend on a sort."""
    m = min(scores.shape[1], max(candidates, int(ks.max())))
    best, ids = scores.topk(m)  # (n, m), the likeliest first
    has_k = (ks > 0)[:, None]  # (n, 1)
    kth = best.gather(1, (ks - 1).clamp_min(0)[:, None])  # (n, 1)
    best = best.masked_fill(has_k & (best < kth), -math.inf)
    total = torch.where(has_k, best.logsumexp(1, keepdim=True), scores.logsumexp(1, keepdim=True))  # (n, 1)
    shares = (best - total).exp()  # (n, m)
    inside = shares.cumsum(1) - shares < ps[:, None]  # what comes before it does not yet make up top_p
    inside[:, 0] = True
    last = best.masked_fill(~inside, math.inf).amin(1, keepdim=True)  # (n, 1)
    eligible = best >= last  # (n, m)
    perturbed = (best + noise(keys, ids.int())).masked_fill(~eligible, -math.inf)  # (n, m)
    tokens = ids.gather(1, perturbed.argmax(1, keepdim=True))[:, 0]  # (n,)
    more = (eligible[:, -1] & (best[:, -1] > -math.inf)).nonzero()[
        :, 0
    ]  # there are eligible tokens beyond the candidates
    if m < scores.shape[1] and len(more):
        tokens[more] = _draw_truncated(scores[more], keys[more], ks[more], ps[more], scores.shape[1])
    return tokens


# ---- The next token of each request in a batch --------------------------------------------------


@dataclass(slots=True)
class _Row:
    """A request that was added.

    Args:
        consumed: tokens of its answer that its grammar has taken.
        cached: tokens of its prompt that were in the cache; None before its first step.
        batch: requests of the largest batch it was in.
    """

    request: InferenceRequest
    consumed: int = 0
    cached: int | None = None
    batch: int = 0
    logprobs: list[float] = field(default_factory=list)


class _Turn(NamedTuple):
    """A request whose scores are changed in this step: its row in them, and its answer so far."""

    i: int
    row: _Row
    answer: list[int]


class Sampler:
    """Takes the place of the library's list of logits processors; called in the engine's loop alone.

    `add` and `forget` may be called from other threads.
    """

    tensors_required = 0
    do_processing = True

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._batch: list[tuple[_Row, Any]] = []
        self.cancelled: list[str] = []  # names in the last batch that were forgotten before it
        self.steps = self.prompt_tokens = self.cached_tokens = self.new_tokens = self.largest = self.running = 0

    def add(self, name: str, request: InferenceRequest) -> None:
        """Announce a request, or one that begins again from its prompt."""
        self._rows[name] = _Row(request)
        if request.constraint is not None:
            request.constraint.reset()

    def forget(self, name: str) -> tuple[int, int, tuple[float, ...]]:
        """Remove a request that ended; the tokens of its prompt that were cached, its largest batch, its logprobs."""
        row = self._rows.pop(name, None)
        return (0, 0, ()) if row is None else (row.cached or 0, row.batch, tuple(row.logprobs))

    def gauge(self, **rest: Any) -> Gauge:
        """Its counts, with what else a Gauge has."""
        return Gauge(
            running=self.running, steps=self.steps, prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens,
            new_tokens=self.new_tokens, largest_batch=self.largest, **rest,
        )  # fmt: skip

    # ---- what the library calls ----------------------------------------------------------------
    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Requests carry none."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Requests have no defaults."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Note which requests the next step computes; called before it."""
        self._batch, self.cancelled = [], []
        self.steps += 1
        self.running = len(requests_in_batch)
        self.largest = max(self.largest, self.running)
        for future in requests_in_batch:
            row = self._rows.get(future.state.request_id)
            if row is None:  # cancelled meanwhile; its token is discarded
                row = _Row(InferenceRequest((0,), 1))
                self.cancelled.append(future.state.request_id)
            row.batch = max(row.batch, self.running)
            if row.cached is None:
                row.cached = future.state.position_offset - future.query_length
                self.cached_tokens += row.cached
                self.prompt_tokens += len(row.request.tokens)
            if future.has_new_token:
                self._batch.append((row, future.state))
        self.new_tokens += len(self._batch)
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        """The scores (n, v), changed so that the largest of each row is its next token."""
        turns = [
            # an evicted request has the first part of its answer in its prompt
            _Turn(i, row, state.initial_tokens[len(row.request.tokens) :] + state.generated_tokens)
            for i, (row, state) in enumerate(self._batch)
            if row.request.constraint is not None or row.request.temperature > 0 or row.request.logprobs
        ]
        logged = [turn for turn in turns if turn.row.request.logprobs]
        rows = [turn.i for turn in logged]
        plain = scores[rows].float().log_softmax(1) if logged else scores  # (logged, v), before anything is changed
        self._constrain(scores, [turn for turn in turns if turn.row.request.constraint is not None])
        self._draw(scores, [turn for turn in turns if turn.row.request.temperature > 0])
        if logged:
            logprobs = plain.gather(1, scores[rows].argmax(1, keepdim=True))[:, 0].tolist()  # (logged,)
            for turn, logprob in zip(logged, logprobs, strict=True):
                turn.row.logprobs[len(turn.answer) :] = [logprob]
        return scores

    def _constrain(self, scores: torch.Tensor, turns: Sequence[_Turn]) -> None:
        rows, masks = [], []
        for i, row, answer in turns:
            row.request.constraint.take(answer[row.consumed :])
            row.consumed = len(answer)
            allowed = row.request.constraint.allowed(scores.shape[1])
            if allowed is not None:
                rows.append(i)
                masks.append(allowed)
        if rows:
            forbidden = torch.from_numpy(~np.stack(masks)).to(scores.device)  # (rows, v)
            scores[rows] = scores[rows].masked_fill(forbidden, -math.inf)

    def _draw(self, scores: torch.Tensor, turns: Sequence[_Turn]) -> None:
        if turns:
            rows = [turn.i for turn in turns]
            options = [
                DrawOptions(
                    row.request.temperature, row.request.top_k, row.request.top_p, row.request.seed, len(answer)
                )
                for _, row, answer in turns
            ]
            drawn = draw(scores[rows], options)[:, None]  # (rows, 1)
            scores[rows] = scores[rows].scatter(1, drawn, math.inf)
