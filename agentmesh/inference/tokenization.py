"""From tokens to text as they come: whole characters, reasoning apart from the answer, and stop strings never shown."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from agentmesh.errors import ModelError
from agentmesh.model import RetryLater

HALF_CHARACTER = "\ufffd"  # what the first bytes of a character decode to
THINK, THINK_END = "<think>", "</think>"


class Piece(NamedTuple):
    """Some text of an answer, or of the reasoning before it."""

    kind: Literal["text", "thought"]
    text: str


class Detokeniser:
    """Text of tokens that arrive a few at a time; the end of the last call's tokens is decoded again with the next."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode, self._before, self._told = decode, 0, 0

    def more(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """What can be said now.

        Args:
            tokens: all so far.
            last: nothing follows; half a character is said as it is.
        """
        if self._told == len(tokens):
            return ""
        old = self._decode(tokens[self._before : self._told])
        new = self._decode(tokens[self._before :])
        if (new.endswith(HALF_CHARACTER) and not last) or len(new) <= len(old):
            return ""
        self._before, self._told = self._told, len(tokens)
        return new[len(old) :]


class AnswerStream:
    """One answer as it becomes text.

    Args:
        tokenizer: of transformers.
        stops: strings that end the answer; not part of it.
        thinking: the prompt ends inside the model's reasoning.
        tell: gets each piece; None for whoever wants only the whole.
    """

    def __init__(
        self, tokenizer: Any, *, stops: Sequence[str] = (), thinking: bool = False,
        tell: Callable[[Piece], None] | None = None,
    ) -> None:  # fmt: skip
        self._detokeniser = Detokeniser(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
        self._stops, self._tell = [s for s in stops if s], tell
        self._mode: Literal["first", "thought", "text"] = "thought" if thinking else "first"
        self._thought = False  # its reasoning is over
        self._held = ""  # may still become a tag, a stop string or white space that is not wanted
        self._said: dict[str, list[str]] = {"text": [], "thought": []}
        self._heard: tuple[int, ...] = ()
        self.ended = False  # on a stop string

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._said["text"])

    @property
    def thought(self) -> str:
        """The reasoning so far."""
        return "".join(self._said["thought"])

    def hear(self, tokens: Sequence[int]) -> bool:
        """All tokens so far; True when a stop string has come. For `Engine.submit`.

        Raises:
            RetryLater: the request began again, and the model says something else than what was told already.
        """
        known = min(len(tokens), len(self._heard))
        if tuple(tokens[:known]) != self._heard[:known]:
            raise RetryLater(ModelError("the engine restarted this answer and it came out differently"), 0.0)
        if len(tokens) > known:
            self._heard = tuple(tokens)
            self._take(self._detokeniser.more(tokens))
        return self.ended

    def finish(self, tokens: Sequence[int]) -> None:
        """All tokens there will be: what was held back is said."""
        if self.ended:
            return
        self._take(self._detokeniser.more(tokens, last=True))
        if self._mode == "first" and not self.ended:  # what might have become a tag is none
            self._mode = "text"
            self._answer()
        if not self.ended:
            self._say("thought" if self._mode == "thought" else "text", self._held)
            self._held = ""

    # ---- parts ---------------------------------------------------------------------------------
    def _take(self, new: str) -> None:
        if self.ended or not new:
            return
        self._held += new
        if self._mode == "first":
            self._look_for_reasoning()
        if self._mode == "thought":
            self._think()
        if self._mode == "text":
            self._answer()

    def _look_for_reasoning(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(THINK):
            self._mode, self._held = "thought", begun[len(THINK) :]
        elif not THINK.startswith(begun):
            self._mode = "text"

    def _think(self) -> None:
        thought, found, rest = self._held.partition(THINK_END)
        if found:
            self._say("thought", thought)
            self._held, self._mode, self._thought = rest, "text", True
            return
        held = _partial_match(self._held, [THINK_END])
        self._say("thought", self._held[: len(self._held) - held])
        self._held = self._held[len(self._held) - held :]

    def _answer(self) -> None:
        if self._thought and not self._said["text"]:
            self._held = self._held.lstrip()  # the blank lines after it
        first = min((at for s in self._stops if (at := self._held.find(s)) >= 0), default=-1)
        if first >= 0:
            self._say("text", self._held[:first])
            self._held, self.ended = "", True
            return
        held = _partial_match(self._held, self._stops)
        self._say("text", self._held[: len(self._held) - held])
        self._held = self._held[len(self._held) - held :]

    def _say(self, kind: Literal["text", "thought"], text: str) -> None:
        if text:
            self._said[kind].append(text)
            if self._tell is not None:
                self._tell(Piece(kind, text))


def _partial_match(text: str, wanted: Sequence[str]) -> int:
    """How many characters at the end of the text are the beginning of one of these."""
    return max((n for w in wanted for n in range(1, len(w)) if text.endswith(w[:n])), default=0)


# ---- A model's special tokens, where somebody writes their names --------------------------------

SEPARATOR = "\ufdd0"  # no character: Unicode keeps it free for uses like this one


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Their names, of a tokenizer of transformers."""
    return tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1)


def separate_special(value: Any, names: Sequence[str]) -> Any:
    """JSON in which no text has such a name: a seam is in each, for `token_ids` to cut there."""
    if isinstance(value, str):
        for name in names:
            while name in value:
                value = value.replace(name, name[0] + SEPARATOR + name[1:])
        return value
    if isinstance(value, dict):
        return {separate_special(k, names): separate_special(v, names) for k, v in value.items()}
    return [separate_special(v, names) for v in value] if isinstance(value, list | tuple) else value


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text; what a seam parts is read piece by piece, so that it says the same and is no special token."""
    # verbose: a prompt that is too long is our error to raise, not the tokenizer's to warn about
    pieces = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in text.split(SEPARATOR))
    return [token for piece in pieces for token in piece]
