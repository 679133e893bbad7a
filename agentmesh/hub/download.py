"""One file over HTTP onto the disk, resumed where it broke off and checked against its sha256; and where pip finds a package's file."""

import base64
import contextlib
import hashlib
import html
import http.client
import json
import os
import re
import shutil
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentmesh.errors import ConfigError, MeshError, ServiceDown
from agentmesh.hub.cache import cache_folder

Progress = Callable[[str, int, int], None]
BLOCK_BYTES = 1 << 20
TIMEOUT_S = 60.0
RANGE_NOT_SATISFIABLE, PARTIAL, SERVER_ERROR, TOO_MANY, DENIED_CODES = 416, 206, 500, 429, (401, 403)


class DownloadDenied(ConfigError):
    """The server rejects the credentials, or there are none (`code` 401), or refuses access (403)."""

    fields = ("code",)
    code: int


def download(
    url: str, target: Path, *, sha256: str = "", blob: str = "", token: str = "", progress: Progress | None = None
) -> str:
    """Fetch a file to `target`, in one rename at the end; the part of an earlier, interrupted download is resumed.

    Args:
        sha256: expected, in hex; empty where it is not known.
        blob: the expected name of git's blob, in hex; empty where it is not known.
        token: sent to this server, and not to another that it redirects to.
        progress: called with the file's name, bytes so far and bytes in all (0: not known).

    Returns:
        Its sha256 in hex.

    Raises:
        ServiceDown: the server is unreachable, or the download broke off.
        DownloadDenied: the server refuses this token.
        ConfigError: the server has no such file, its content is not the expected one, or the disk has no room.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    for may_restart in (True, False):
        resumed = _resume(url, part, token, progress)
        digest, is_blob = sha256_of(part), not blob or git_blob_of(part) == blob
        if is_blob and sha256 in ("", digest):
            part.replace(target)
            return digest
        part.unlink()
        if not (resumed and may_restart):  # else the old part may have been of another file: restart once
            expected = f"{sha256[:12]}…" if sha256 else f"git's name {blob[:12]}…"
            raise ConfigError(
                f"{target.name} has sha256 {digest[:12]}… and should have {expected}, so it was changed or truncated in transit",
                hint="pull it again",
            )
    raise AssertionError("unreachable")


def read_url(url: str, *, accept: str = "application/json", token: str = "") -> bytes:
    """Fetch a small document.

    Raises:
        ServiceDown, ConfigError: as `download`.
    """
    with _open(url, {"Accept": accept}, token=token) as response:
        try:
            content: bytes = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise ServiceDown(f"the response of {without_credentials(url)} broke off ({e!r})", hint="retry") from None
    return content


def sha256_of(path: Path) -> str:
    """A file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_of(path: Path) -> str:
    """The name of git's blob with this content, in hex."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    digest.update(path.read_bytes())  # small: of a large file the hub names the sha256
    return digest.hexdigest()


def without_credentials(url: str) -> str:
    """An address without the password that it may hold."""
    return _split_credentials(url)[0]


def _resume(url: str, part: Path, token: str, progress: Progress | None) -> bool:
    """Bring `part` to its full length; True if it resumed an earlier one."""
    done = part.stat().st_size if part.is_file() else 0
    response = _open(url, {"Range": f"bytes={done}-"} if done else {}, token=token, complete_ok=done > 0)
    if response is None:  # the part is complete already
        return True
    with response:
        if response.status != PARTIAL:
            done = 0
        resumed, length = done > 0, response.headers.get("Content-Length")
        total = done + int(length) if length else 0
        require_disk_space(part, total - done)
        with _explain_write_errors(part), part.open("ab" if done else "wb") as out:
            while block := _block(response, url):
                out.write(block)
                done += len(block)
                if progress is not None:
                    progress(part.stem, done, total)
    if done < total:  # http.client raises nothing
        raise ServiceDown(
            f"the download of {without_credentials(url)} broke off at {done} of {total} bytes",
            hint="pull again to resume",
        )
    return resumed


def _block(response: Any, url: str) -> bytes:
    try:
        block: bytes = response.read(BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as e:
        raise ServiceDown(
            f"the download of {without_credentials(url)} broke off ({e!r})", hint="pull again to resume"
        ) from None
    return block


@contextlib.contextmanager
def _explain_write_errors(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:  # errors of the network are ServiceDown already
        raise ConfigError(
            f"{str(part)!r} cannot be written ({e.strerror})", hint="make room, then pull again to resume"
        ) from None


def require_disk_space(part: Path, bytes_: int) -> None:
    """Check that the disk of `part` has room for so many bytes more.

    Raises:
        ConfigError: it has not.
    """
    free = shutil.disk_usage(part.parent).free
    if bytes_ > free:
        raise ConfigError(
            f"{part.stem} needs {bytes_ / 1e6:.0f} MB and {str(part.parent)!r} has {free / 1e6:.0f} MB free",
            hint="make room, or point AGENTMESH_CACHE at a folder that has it",
        )


def _open(url: str, headers: dict[str, str], *, token: str = "", complete_ok: bool = False) -> Any:
    """The response; None where the requested range begins at the file's end and `complete_ok`."""
    address, login = _split_credentials(url)
    request = urllib.request.Request(address, headers={"User-Agent": "agentmesh", **headers})
    if login:
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    elif token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S, context=_ssl_context())
    except urllib.error.HTTPError as e:
        e.close()
        if complete_ok and e.code == RANGE_NOT_SATISFIABLE:
            return None
        if e.code >= SERVER_ERROR or e.code == TOO_MANY:
            raise ServiceDown(f"{address} answered {e.code}", hint="retry later") from None
        if e.code in DENIED_CODES:
            raise DownloadDenied(f"{address} answered {e.code}", hint="check that it is public", code=e.code) from None
        raise ConfigError(f"{address} answered {e.code}", hint="check the name, and that it is public") from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise ServiceDown(
            f"cannot reach {address} ({getattr(e, 'reason', e)})",
            hint="pull the model on a machine with a network, "
            f"and point AGENTMESH_CACHE at a copy of its cache folder (here {str(cache_folder())!r})",
        ) from None


def _split_credentials(url: str) -> tuple[str, str]:
    """An address without its `user:password@`, and that part."""
    parts = urllib.parse.urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    return (urllib.parse.urlunsplit(parts._replace(netloc=host)), urllib.parse.unquote(login)) if at else (url, "")


def _ssl_context() -> ssl.SSLContext:
    """The system's certificates, and those of PIP_CERT."""
    context = ssl.create_default_context()
    bundle = os.environ.get("PIP_CERT")
    if bundle and Path(bundle).is_file():
        context.load_verify_locations(bundle)
    return context


# ---- Where pip would look for a package's file --------------------------------------------------

try:
    # pip has no public way to ask for its settings; these names are as old as its configuration is
    from pip._internal.configuration import Configuration
    from pip._internal.models.index import PyPI
except ImportError:  # without pip, PIP_INDEX_URL must be set
    Configuration = PyPI = None  # type: ignore[assignment,misc]  # the types of what is missing

ACCEPT_SIMPLE = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"  # PEP 691


def wheel_url(package: str, version: str) -> str:
    """The address of a package's wheel for every platform.

    Raises:
        ServiceDown, ConfigError: none of pip's configured places has it; the error of the first one.
    """
    wheel = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    for link in pip_setting("find-links"):
        file = Path(urllib.request.url2pathname(urllib.parse.urlsplit(link).path) if "://" in link else link) / wheel
        if file.is_file():
            return file.absolute().as_uri()
    problems: list[MeshError] = []
    for index in [*(pip_setting("index-url") or [_default_index()]), *pip_setting("extra-index-url")]:
        page = f"{index.rstrip('/')}/{package}/"
        try:
            urls = [url for url in _file_links(page) if urllib.parse.urlsplit(url).path.rpartition("/")[2] == wheel]
        except MeshError as e:
            problems.append(e)
            continue
        if urls:
            return urls[0]
        problems.append(
            ConfigError(f"{without_credentials(page)} has no {wheel}", hint="set PIP_INDEX_URL to an index that has it")
        )
    raise problems[0]


def pip_setting(name: str) -> list[str]:
    """A setting of pip's, split at blanks: from the environment, else from its configuration; empty where it is not set."""
    configured = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if configured:
        return configured.split()
    if Configuration is None:
        return []
    configuration = Configuration(isolated=False)
    configuration.load()
    values: dict[str, object] = {}
    for key, value in configuration.items():  # pip 26 groups by file, the least important first
        values |= value if isinstance(value, dict) else {key: value}
    return str(values.get(f"download.{name}") or values.get(f"global.{name}") or "").split()


def _default_index() -> str:
    if PyPI is None:
        raise ConfigError("pip is not installed, so the package index is not known", hint="set PIP_INDEX_URL")
    return str(PyPI.simple_url)


def _file_links(page: str) -> list[str]:
    """The files' addresses on a package's page, JSON or HTML."""
    text = read_url(page, accept=ACCEPT_SIMPLE).decode()
    if text.lstrip().startswith("{"):
        links = [str(file["url"]) for file in json.loads(text)["files"]]
    else:
        links = [html.unescape(link) for link in re.findall(r"""<a\s[^>]*?href=["']([^"']+)["']""", text)]
    return [urllib.parse.urljoin(page, link) for link in links]
