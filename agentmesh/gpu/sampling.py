"""The next token of each request in a batch: grammar, temperature, top-k and top-p, then noise that follows from a seed.

The library takes the largest score. Where a request is to be drawn, noise of Gumbel's distribution is added to its
scores first: the largest is then a draw from their softmax, for this request alone, whoever else is in the batch.

Source: Gumbel-max, https://arxiv.org/abs/1611.00712 (section 3.1)
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from agentmesh.gpu.request import Gauge, Request


@dataclass(slots=True)
class _Row:
    """A request the sampler knows."""

    request: Request
    seen: int = 0  # tokens its grammar has taken
    cached: int | None = None
    batch: int = 0
    logprobs: list[float] = field(default_factory=list)


def noise(seed: int, place: int, size: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise for one place of one answer; the same wherever and with whom it is computed on this kind of device.

    Returns:
        float32 (size,).
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()[:7])
    draws = torch.Generator(device).manual_seed(key)
    return torch.empty(size, device=device).exponential_(generator=draws).clamp_min_(1e-30).log_().neg_()


def narrowed(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The scores (v,) with all but the likeliest at -inf."""
    if 0 < top_k < scores.shape[0]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -math.inf)
    if top_p < 1.0:
        ordered, order = scores.sort(descending=True)
        shares = ordered.softmax(0)
        beyond = shares.cumsum(0) - shares >= top_p  # what comes before it already makes up top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -math.inf)
    return scores


class Sampler:
    """Stands where the library has its list of logits processors; called in the engine's loop alone.

    `add` and `forget` may be called from other threads.
    """

    tensors_required = 0
    do_processing = True

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._batch: list[tuple[_Row, Any]] = []
        self.steps = self.prompt_tokens = self.cached_tokens = self.new_tokens = self.largest = self.running = 0

    def add(self, name: str, request: Request) -> None:
        """A request is about to come, or to come again from its prompt."""
        self._rows[name] = _Row(request)
        if request.constraint is not None:
            request.constraint.reset()

    def forget(self, name: str) -> tuple[int, int, tuple[float, ...]]:
        """A request is over: how much of its prompt was cached, its largest batch, its logprobs."""
        row = self._rows.pop(name, None)
        return (0, 0, ()) if row is None else (row.cached or 0, row.batch, tuple(row.logprobs))

    def gauge(self, **rest: Any) -> Gauge:
        """What was counted."""
        return Gauge(
            running=self.running, steps=self.steps, prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens,
            new_tokens=self.new_tokens, largest_batch=self.largest, **rest,
        )  # fmt: skip

    # ---- what the library calls ----------------------------------------------------------------
    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Requests carry none."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """There are none."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Before a step: who is in the batch, and what each one's grammar allows."""
        self._batch = []
        self.steps += 1
        self.running = len(requests_in_batch)
        self.largest = max(self.largest, self.running)
        for future in requests_in_batch:
            row = self._rows.get(future.state.request_id)
            if row is None:  # cancelled meanwhile; its token is thrown away
                row = _Row(Request((0,), 1))
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
        for i, (row, state) in enumerate(self._batch):
            request = row.request
            if request.constraint is None and request.temperature <= 0 and not request.logprobs:
                continue
            before = len(request.tokens)
            said = state.initial_tokens[before:] + state.generated_tokens  # an evicted request has some in its prompt
            plain, changed = scores[i], scores[i]
            if request.constraint is not None:
                changed = self._constrained(row, said, changed)
            if request.temperature > 0:
                changed = narrowed(changed / request.temperature, request.top_k, request.top_p)
                changed = changed + noise(request.seed, len(said), changed.shape[0], changed.device)
            if request.logprobs:
                del row.logprobs[len(said) :]
                row.logprobs.append(float(plain.log_softmax(0)[changed.argmax()]))
            scores[i] = changed
        return scores

    def _constrained(self, row: _Row, said: list[int], scores: torch.Tensor) -> torch.Tensor:
        row.request.constraint.take(said[row.seen :])
        row.seen = len(said)
        allowed = row.request.constraint.allowed(scores.shape[0])
        if allowed is None:
            return scores
        return scores.masked_fill(torch.from_numpy(~allowed).to(scores.device), -math.inf)
