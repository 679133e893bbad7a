"""The next token of each request in a batch: what its grammar allows, then the likeliest, or a draw (see `drawing`).

The library takes the largest score. Where a request is drawn, the token that was drawn is given the largest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from agentmesh.gpu.drawing import Wish, draw
from agentmesh.gpu.request import Gauge, Request


@dataclass(slots=True)
class _Row:
    """A request the sampler knows."""

    request: Request
    seen: int = 0  # tokens its grammar has taken
    cached: int | None = None
    batch: int = 0
    logprobs: list[float] = field(default_factory=list)


_Asked = tuple[int, _Row, list[int]]  # its row in the scores, the request, and what it has said


class Sampler:
    """Stands where the library has its list of logits processors; called in the engine's loop alone.

    `add` and `forget` may be called from other threads.
    """

    tensors_required = 0
    do_processing = True

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._batch: list[tuple[_Row, Any]] = []
        self.strangers: list[str] = []  # in the last batch, of nobody who waits
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
        self._batch, self.strangers = [], []
        self.steps += 1
        self.running = len(requests_in_batch)
        self.largest = max(self.largest, self.running)
        for future in requests_in_batch:
            row = self._rows.get(future.state.request_id)
            if row is None:  # cancelled meanwhile; its token is thrown away
                row = _Row(Request((0,), 1))
                self.strangers.append(future.state.request_id)
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
        asked = [
            # an evicted request has some of what it said in its prompt
            (i, row, state.initial_tokens[len(row.request.tokens) :] + state.generated_tokens)
            for i, (row, state) in enumerate(self._batch)
            if row.request.constraint is not None or row.request.temperature > 0 or row.request.logprobs
        ]
        told = [(i, row, said) for i, row, said in asked if row.request.logprobs]
        rows = [i for i, _, _ in told]
        plain = scores[rows].float().log_softmax(1) if told else scores  # (told, v), before anything is changed
        self._constrain(scores, [one for one in asked if one[1].request.constraint is not None])
        self._draw(scores, [one for one in asked if one[1].request.temperature > 0])
        if told:
            logprobs = plain.gather(1, scores[rows].argmax(1, keepdim=True))[:, 0].tolist()
            for (_, row, said), logprob in zip(told, logprobs, strict=True):
                row.logprobs[len(said) :] = [logprob]
        return scores

    def _constrain(self, scores: torch.Tensor, asked: Sequence[_Asked]) -> None:
        rows, allowed = [], []
        for i, row, said in asked:
            row.request.constraint.take(said[row.seen :])
            row.seen = len(said)
            may_come = row.request.constraint.allowed(scores.shape[1])
            if may_come is not None:
                rows.append(i)
                allowed.append(may_come)
        if rows:
            forbidden = torch.from_numpy(~np.stack(allowed)).to(scores.device)  # (rows, v)
            scores[rows] = scores[rows].masked_fill(forbidden, -math.inf)

    def _draw(self, scores: torch.Tensor, asked: Sequence[_Asked]) -> None:
        if asked:
            rows = [i for i, _, _ in asked]
            wishes = [
                Wish(row.request.temperature, row.request.top_k, row.request.top_p, row.request.seed, len(said))
                for _, row, said in asked
            ]
            scores[rows] = scores[rows].scatter(1, draw(scores[rows], wishes)[:, None], math.inf)
