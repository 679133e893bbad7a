"""An engine's requests, answers and capacity, in token ids and numbers. Without torch, so that any room may import it."""

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from agentmesh.errors import ContextTooLong, ModelError


class EngineDown(Exception):
    """The engine cannot continue; another process may retry what was in flight."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """One prompt.

    Args:
        tokens: the prompt, at least one.
        most_tokens: of the answer, at least 1.
        ends: ids that end the answer; they are not part of it.
        temperature: 0 takes the likeliest token; else the draw depends on `seed` and the token's place alone.
        top_k: the k likeliest are drawn from; 0 is all.
        top_p: the likeliest whose probabilities make up so much are drawn from, in (0, 1].
        logprobs: whether the answer has each token's log probability, before any temperature or grammar.
        constraint: an `inference.grammar.Constraint` on the next token.
    """

    tokens: tuple[int, ...]
    most_tokens: int
    ends: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    logprobs: bool = False
    constraint: Any = None  # its type would bring numpy and llguidance

    @property
    def size(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return len(self.tokens) + self.most_tokens


@dataclass(frozen=True, slots=True)
class Done:
    """An answer.

    Args:
        tokens: without the one that ended it.
        finish: `stop` at an end token or because `on_tokens` returned True, `length` at `most_tokens`.
        logprobs: one for each token, where they were asked for.
        cached_tokens: of the prompt, not computed because an earlier prompt began alike.
        batch: requests of the largest batch it was computed in, itself counted.
    """

    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]
    logprobs: tuple[float, ...] = ()
    cached_tokens: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """An engine's capacity.

    Args:
        cache_tokens: in the cache of keys and values, for all requests together.
        page_tokens: the cache is given out in pages of so many.
        context_tokens: the longest prompt and answer the model was made for.
        vocabulary: ids are below it.
    """

    cache_tokens: int
    page_tokens: int
    context_tokens: int
    vocabulary: int

    @property
    def longest(self) -> int:
        """The most tokens one request may have: one page stays free, or the last step would find none."""
        return min(self.context_tokens, self.cache_tokens - self.page_tokens)

    def pages(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.page_tokens)

    def check(self, request: InferenceRequest) -> None:
        """Check that the engine can compute a request; one that it cannot would end its loop for every request.

        Raises:
            ContextTooLong, ModelError: it cannot, and why.
        """
        if request.size > self.longest:
            limit = "the model's context" if self.longest == self.context_tokens else "the cache of this process"
            raise ContextTooLong(
                f"the prompt has {len(request.tokens)} tokens and asks for {request.most_tokens} more, and "
                f"{limit} takes {self.longest} together",
                hint="send less, or lower max_tokens",
            )
        if not request.tokens or request.most_tokens < 1:
            raise ModelError(
                f"a request of {len(request.tokens)} tokens that asks for {request.most_tokens} more is empty",
                hint="send at least one token, and ask for at least one",
            )
        low, high = min(request.tokens), max(request.tokens)
        if low < 0 or high >= self.vocabulary:
            raise ModelError(
                f"token id {low if low < 0 else high} is not in the model's vocabulary of {self.vocabulary}",
                hint="use the model's own tokenizer",
            )


@dataclass(frozen=True, slots=True)
class Gauge:
    """An engine's state; counts are since it was made.

    Args:
        running: requests in the batch of the last step. waiting: submitted and not yet in a batch.
        free_pages: not held by a request; `pages` are all there are.
        stepped_s: `time.monotonic()` of the last step, or of the last time it had nothing to do.
        idle: no request is in flight.
        deaths: how often the loop ended by an error.
        batch_tokens: new tokens of one step at most, as they are now.
    """

    running: int = 0
    waiting: int = 0
    pages: int = 0
    free_pages: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    largest_batch: int = 0
    stepped_s: float = 0.0
    idle: bool = True
    deaths: int = 0
    batch_tokens: int = 0


# ---- How much of an engine's cache the next request will need -----------------------------------

FIRST_TOKENS, FIRST_ANSWER_TOKENS = 512.0, 256.0  # before any request has come or ended
WEIGHT = 0.1  # of the last request in the running means


class DemandEstimate:
    """A running mean; used under the engine's lock.

    Attributes:
        tokens: expected of the next request: the part of its prompt that is not cached, and its answer.
    """

    def __init__(self) -> None:
        self.tokens = FIRST_TOKENS
        self._answer_tokens, self._uncached_share = FIRST_ANSWER_TOKENS, 1.0

    def arrived(self, request: InferenceRequest) -> None:
        """Count a request that arrived: those that follow from the broker resemble it, long before it has ended."""
        answer = min(request.most_tokens, self._answer_tokens)
        self.tokens += WEIGHT * (len(request.tokens) * self._uncached_share + answer - self.tokens)

    def ended(self, request: InferenceRequest, *, cached_tokens: int, answer_tokens: int) -> None:
        """Count what a request took."""
        self._answer_tokens += WEIGHT * (answer_tokens - self._answer_tokens)
        self._uncached_share += WEIGHT * (1 - cached_tokens / len(request.tokens) - self._uncached_share)
