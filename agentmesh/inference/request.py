"""What an engine is asked and what it answers: token ids and numbers. Knows no torch, so that anyone may speak it."""

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from agentmesh.errors import ContextTooLong, ModelError


class EngineDown(Exception):
    """The engine cannot continue; another process may retry what was in flight."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt.

    Args:
        tokens: the prompt, at least one.
        most_tokens: how many may be answered, at least 1.
        ends: ids that end the answer; they are not part of it.
        temperature: 0 takes the likeliest token; else what is drawn follows from `seed` and the place alone.
        top_k: the k likeliest are drawn from; 0 is all.
        top_p: the likeliest whose probabilities make up so much are drawn from, in (0, 1].
        logprobs: whether the answer says how likely each token was, before any temperature or grammar.
        constraint: a inference.grammar.Constraint that says which tokens may come next.
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
        finish: `stop` at an end token or because the asker had enough, `length` at `most_tokens`.
        logprobs: one for each token, where they were asked for.
        cached_tokens: of the prompt, not computed because an earlier prompt began alike.
        batch: with how many requests it was computed together, itself counted, at most.
    """

    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]
    logprobs: tuple[float, ...] = ()
    cached_tokens: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """How much an engine can hold.

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

    def check(self, request: Request) -> None:
        """Whether the engine could ever do this; what it cannot would end its loop for everybody.

        Raises:
            ContextTooLong, ModelError: it could not, and why.
        """
        if request.size > self.longest:
            why = "the model's context" if self.longest == self.context_tokens else "the cache of this process"
            raise ContextTooLong(
                f"the prompt has {len(request.tokens)} tokens and asks for {request.most_tokens} more",
                hint=f"{why} takes {self.longest} together: send less",
            )
        if not request.tokens or request.most_tokens < 1:
            raise ModelError(
                f"a request of {len(request.tokens)} tokens that asks for {request.most_tokens} more is empty",
                hint="send at least one and ask for at least one",
            )
        low, high = min(request.tokens), max(request.tokens)
        if low < 0 or high >= self.vocabulary:
            raise ModelError(
                f"token id {low if low < 0 else high} is not in the model's vocabulary of {self.vocabulary}",
                hint="the tokenizer is another model's",
            )


@dataclass(frozen=True, slots=True)
class Gauge:
    """How an engine stands; counts are since it was made.

    Args:
        running: requests in the batch of the last step. waiting: handed in and not yet in a batch.
        free_pages: not held by a request; `pages` are all there are.
        stepped_s: `time.monotonic()` of the last step, or of the last time it found nothing to do.
        idle: nothing is in hand.
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

FIRST_TOKENS, FIRST_ANSWER_TOKENS = 512.0, 256.0  # before any has come or ended
WEIGHT = 0.1  # of the last request in the running means


class DemandEstimate:
    """A running guess; used under the engine's lock.

    Attributes:
        tokens: what the next request is taken to need: of its prompt what is not cached, and its answer.
    """

    def __init__(self) -> None:
        self.tokens = FIRST_TOKENS
        self._answer_tokens, self._uncached_share = FIRST_ANSWER_TOKENS, 1.0

    def came(self, request: Request) -> None:
        """Those that wait in the broker are likely as those that come from there: known long before the first has ended."""
        answer = min(request.most_tokens, self._answer_tokens)
        self.tokens += WEIGHT * (len(request.tokens) * self._uncached_share + answer - self.tokens)

    def ended(self, request: Request, *, cached_tokens: int, answer_tokens: int) -> None:
        """What it really took."""
        self._answer_tokens += WEIGHT * (answer_tokens - self._answer_tokens)
        self._uncached_share += WEIGHT * (1 - cached_tokens / len(request.tokens) - self._uncached_share)
