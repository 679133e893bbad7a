"""The Lua scripts, by name."""

import hashlib
from functools import cache
from importlib.resources import files


@cache
def script(name: str) -> tuple[str, str]:
    """A script's text and its SHA-1, by which the server knows it. A verb that writes begins with what all share."""
    folder = files("agentmesh.journal") / "lua"
    text = (folder / f"{name}.lua").read_text()
    if not text.startswith("#!lua"):
        text = f"{(folder / 'common.lua').read_text()}\n{text}"
    return text, hashlib.sha1(text.encode()).hexdigest()  # Redis' own choice
