"""Tokens to text as they arrive: whole characters, reasoning apart from the answer, stop strings removed."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from agentmesh.errors import ModelError
from agentmesh.model import RetryLater

HALF_CHARACTER = "\ufffd"  # what the first bytes of a character decode to
THINK, THINK_END = "<think>", "</think>"


class AnswerPiece(NamedTuple):
    """Some text of an answer, or of the reasoning before it."""

    kind: Literal["text", "thought"]
    text: str


class Detokeniser:
    """Text of tokens that arrive a few at a time; the end of the last call's tokens is decoded again with the next."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode, self._before, self._returned = decode, 0, 0

    def more(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that is complete now.

        Args:
            tokens: all so far.
            last: no more follow; half a character is returned as it is.
        """
        if self._returned == len(tokens):
            return ""
        old = self._decode(tokens[self._before : self._returned])
        new = self._decode(tokens[self._before :])
        if (new.endswith(HALF_CHARACTER) and not last) or len(new) <= len(old):
            return ""
        self._before, self._returned = self._returned, len(tokens)
        return new[len(old) :]


class AnswerStream:
    """One answer as it becomes text.

    Args:
        tokenizer: of transformers.
        stops: strings that end the answer; not part of it.
        thinking: the prompt ends inside the model's reasoning.
        tell: called with each piece; None where only the whole is wanted.
    """

    def __init__(
        self, tokenizer: Any, *, stops: Sequence[str] = (), thinking: bool = False,
        tell: Callable[[AnswerPiece], None] | None = None,
    ) -> None:  # fmt: skip
        self._detokeniser = Detokeniser(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
        self._stops, self._tell = [s for s in stops if s], tell
        self._mode: Literal["first", "thought", "text"] = "thought" if thinking else "first"
        self._thought = False  # its reasoning is over
        self._pending = ""  # may still become a tag, a stop string or white space to drop
        self._texts: dict[str, list[str]] = {"text": [], "thought": []}
        self._taken: tuple[int, ...] = ()
        self.ended = False  # on a stop string

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._texts["text"])

    @property
    def thought(self) -> str:
        """The reasoning so far."""
        return "".join(self._texts["thought"])

    def feed(self, tokens: Sequence[int]) -> bool:
        """Take all tokens so far; True when a stop string was reached. The `on_tokens` of `InferenceEngine.submit`.

        Raises:
            RetryLater: the request began again, and its answer differs from what was streamed already.
        """
        common = min(len(tokens), len(self._taken))
        if tuple(tokens[:common]) != self._taken[:common]:
            raise RetryLater(ModelError("the engine restarted this answer and it came out differently"), 0.0)
        if len(tokens) > common:
            self._taken = tuple(tokens)
            self._take(self._detokeniser.more(tokens))
        return self.ended

    def finish(self, tokens: Sequence[int]) -> None:
        """Take the tokens of the whole answer, and emit what was held back."""
        if self.ended:
            return
        self._take(self._detokeniser.more(tokens, last=True))
        if self._mode == "first" and not self.ended:  # what might have become a tag is not one
            self._mode = "text"
            self._answer()
        if not self.ended:
            self._emit("thought" if self._mode == "thought" else "text", self._pending)
            self._pending = ""

    # ---- parts ---------------------------------------------------------------------------------
    def _take(self, new: str) -> None:
        if self.ended or not new:
            return
        self._pending += new
        if self._mode == "first":
            self._look_for_reasoning()
        if self._mode == "thought":
            self._think()
        if self._mode == "text":
            self._answer()

    def _look_for_reasoning(self) -> None:
        begun = self._pending.lstrip()
        if begun.startswith(THINK):
            self._mode, self._pending = "thought", begun[len(THINK) :]
        elif not THINK.startswith(begun):
            self._mode = "text"

    def _think(self) -> None:
        thought, end_tag, rest = self._pending.partition(THINK_END)
        if end_tag:
            self._emit("thought", thought)
            self._pending, self._mode, self._thought = rest, "text", True
            return
        held_back = _partial_match(self._pending, [THINK_END])
        self._emit("thought", self._pending[: len(self._pending) - held_back])
        self._pending = self._pending[len(self._pending) - held_back :]

    def _answer(self) -> None:
        if self._thought and not self._texts["text"]:
            self._pending = self._pending.lstrip()  # the blank lines after it
        first = min((at for s in self._stops if (at := self._pending.find(s)) >= 0), default=-1)
        if first >= 0:
            self._emit("text", self._pending[:first])
            self._pending, self.ended = "", True
            return
        held_back = _partial_match(self._pending, self._stops)
        self._emit("text", self._pending[: len(self._pending) - held_back])
        self._pending = self._pending[len(self._pending) - held_back :]

    def _emit(self, kind: Literal["text", "thought"], text: str) -> None:
        if text:
            self._texts[kind].append(text)
            if self._tell is not None:
                self._tell(AnswerPiece(kind, text))


def _partial_match(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of the text are the beginning of a marker, at most."""
    return max((n for m in markers for n in range(1, len(m)) if text.endswith(m[:n])), default=0)


# ---- The names of a model's special tokens in a user's text -------------------------------------

SEPARATOR = "\ufdd0"  # a noncharacter: Unicode keeps it free for internal use


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The names of a tokenizer's special tokens."""
    return tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1)


def separate_special(value: Any, names: Sequence[str]) -> Any:
    """JSON in which no text has such a name: a separator is in each, where `token_ids` cuts."""
    if isinstance(value, str):
        for name in names:
            while name in value:
                value = value.replace(name, name[0] + SEPARATOR + name[1:])
        return value
    if isinstance(value, dict):
        return {separate_special(k, names): separate_special(v, names) for k, v in value.items()}
    return [separate_special(v, names) for v in value] if isinstance(value, list | tuple) else value


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, read piece by piece between separators, so that the name of a special token stays text."""
    # verbose: a prompt that is too long is our error to raise, not the tokenizer's to warn about
    pieces = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in text.split(SEPARATOR))
    return [token for piece in pieces for token in piece]
