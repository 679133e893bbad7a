"""How much of an engine's cache the next request will need: a running guess from those that came and those that ended."""

from agentmesh.gpu.request import Request

FIRST_TOKENS, FIRST_ANSWER_TOKENS = 512.0, 256.0  # before any has come or ended
WEIGHT = 0.1  # of the last request in the running means


class Need:
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
