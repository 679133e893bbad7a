"""Authentication: a bearer key; without a key, only programs of this machine that name it as loopback."""

import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from agentmesh.errors import ConfigError
from agentmesh.serve.responses import ApiError, HttpResponse, Receive, Scope, Send, headers_of

App = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN_PATHS = ("/health",)  # a probe has no key, and gets only counts


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host of this name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def key_from(name: str, host: str) -> str:
    """The key that clients must send, from the environment; "" for none, on loopback.

    Raises:
        ConfigError: the variable is empty, or none is named and other machines reach the address.
    """
    if name:
        key = os.environ.get(name, "").strip()
        if not key:
            raise ConfigError(
                f"--key-env names {name}, which is not set", hint="export it with the key that clients must send"
            )
        return key
    if not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and every request spends your models",
            hint="name a variable that holds a key: --key-env AGENTMESH_KEY, or stay on 127.0.0.1",
        )
    return ""


def _host_name(host: str) -> str:
    """The name in a Host header; "" where it has none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class AuthMiddleware:
    """Passes authorized requests to `app` and refuses the others.

    Args:
        key: that clients must send; "" takes only requests whose Host is a loopback name: one that a web page makes by
            DNS rebinding has another.
    """

    def __init__(self, app: App, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._check(headers_of(scope))
            except ApiError as refusal:
                await HttpResponse(send).refuse(refusal)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: dict[str, str]) -> None:
        if self._key:
            scheme, _, credentials = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(credentials.strip().encode(), self._key):
                raise ApiError(401, "the key is missing or wrong; send `Authorization: Bearer KEY`", "invalid_api_key")
        elif not is_loopback(_host_name(headers.get("host", ""))):
            raise ApiError(
                403, f"host {headers.get('host')!r} is not a name of this machine; a server that other machines reach needs --key-env",
                "host_refused",
            )  # fmt: skip
