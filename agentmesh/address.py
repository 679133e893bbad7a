"""Where an OpenAI-compatible server is and what opens it: arguments, else OPENAI_BASE_URL and OPENAI_API_KEY. Loads no client."""

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from agentmesh.errors import ConfigError

OPENAI = "https://api.openai.com/v1"


def is_server_url(url: object) -> bool:
    """Whether it is an http URL to which a path can be added."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:  # of a port that is not a number, or half a bracket around an address
        return False


def server_address(
    base_url: str | None = None, api_key: str | None = None, *, set_by: str = "OPENAI_BASE_URL"
) -> tuple[str, str]:
    """The base URL, without a slash at its end, and the key, which may be "".

    Args:
        base_url: OPENAI_BASE_URL when left out, else OpenAI's.
        api_key: OPENAI_API_KEY when left out, "" for none; only OpenAI itself insists on one.
        set_by: where the URL comes from, for the error.

    Raises:
        ConfigError: OpenAI's own server and no key, or a base URL that is not a URL.
    """
    url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
    if not is_server_url(url):
        raise ConfigError(f"{set_by} is {url!r}, which is not a URL", hint="write it like 'http://localhost:8000/v1'")
    key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
    if not key and urlsplit(url).hostname == urlsplit(OPENAI).hostname:
        raise ConfigError("OPENAI_API_KEY is not set", hint="set it, or set OPENAI_BASE_URL to a server without keys")
    return url, key


def key_of_servers(key_env: str, urls: Sequence[str]) -> str:
    """The key of a queue's servers, or "" where no variable is named.

    Raises:
        ConfigError: the variable that should hold it is empty.
    """
    key = os.environ.get(key_env, "").strip() if key_env else ""
    if key_env and not key:
        raise ConfigError(
            f"key_env names {key_env}, which is not set", hint=f"export it with the key of {', '.join(urls)}"
        )
    return key
