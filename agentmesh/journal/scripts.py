"""The Lua scripts, by name."""

import hashlib
from functools import cache
from importlib.resources import files

SHARED = ("common", "planning")  # what each verb that writes begins with


@cache
def script(name: str) -> tuple[str, str]:
    """A script's text and its SHA-1, by which the server knows it."""
    folder = files("agentmesh.journal") / "lua"
    text = (folder / f"{name}.lua").read_text()
    if not text.startswith("#!lua"):
        text = "\n".join([*((folder / f"{part}.lua").read_text() for part in SHARED), text])
    return text, hashlib.sha1(text.encode()).hexdigest()  # Redis' own choice
