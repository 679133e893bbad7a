"""A model's special tokens, where somebody writes their names: text like any other, or a message could end its turn and forge one."""

from collections.abc import Sequence
from typing import Any

SEAM = "\ufdd0"  # no character: Unicode keeps it free for uses like this one


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Their names, of a tokenizer of transformers."""
    return tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1)


def parted(value: Any, names: Sequence[str]) -> Any:
    """JSON in which no text has such a name: a seam is in each, for `token_ids` to cut there."""
    if isinstance(value, str):
        for name in names:
            while name in value:
                value = value.replace(name, name[0] + SEAM + name[1:])
        return value
    if isinstance(value, dict):
        return {parted(k, names): parted(v, names) for k, v in value.items()}
    return [parted(v, names) for v in value] if isinstance(value, list | tuple) else value


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text; what a seam parts is read piece by piece, so that it says the same and is no special token."""
    # verbose: a prompt that is too long is our error to raise, not the tokenizer's to warn about
    pieces = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in text.split(SEAM))
    return [token for piece in pieces for token in piece]
