"""Large values live beside the journal: an event of more than 64 KiB keeps a fingerprint, its text is a blob."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

LARGE_BYTES = 64 * 1024
LARGE_KEYS = ("event", "started", "end", "up")
# The whole line, and the fingerprint where no event has a field of its own: a user's `{"blob": …}` is not one.
STUB = re.compile(r'\d+ \{"e":"\w+","blob":"([0-9a-f]{64})"(?:,"n":\d+)?\}')
LONGEST_STUB = 200


def outsource(args: Any) -> Iterator[tuple[str, str]]:
    """Replace each large event text in a verb's arguments, in place; gives (fingerprint, text) of those taken out."""
    if isinstance(args, list):
        for item in args:
            if isinstance(item, dict):
                yield from outsource(item)
    elif isinstance(args, dict):
        for key, value in args.items():
            if isinstance(value, dict | list):
                yield from outsource(value)
            elif key in LARGE_KEYS and isinstance(value, str) and len(value) * 4 > LARGE_BYTES:
                raw = value.encode()
                if len(raw) > LARGE_BYTES:
                    fingerprint = hashlib.sha256(raw).hexdigest()
                    args[key] = _stub(value, fingerprint)
                    yield fingerprint, value


def _stub(text: str, fingerprint: str) -> str:
    """What stays: the kind and the step's number, and where the rest is."""
    event = json.loads(text)
    kept = {"e": event["e"], "blob": fingerprint, **({"n": event["n"]} if "n" in event else {})}
    return json.dumps(kept, separators=(",", ":"))


def fingerprint_of(line: str) -> str:
    """The blob that a journal's line stands for, or nothing."""
    found = STUB.fullmatch(line) if len(line) <= LONGEST_STUB else None
    return found[1] if found else ""


def restored(line: str, text: str) -> str:
    """The line with its whole event again."""
    return f"{line.partition(' ')[0]} {text}"
