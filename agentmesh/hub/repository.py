"""A model's repository on the Hugging Face hub: what it holds, and its files into the cache.

huggingface_hub says where the hub is, who is logged in, whether this process is offline, and what its own cache holds. The
bytes come by `download`: `hf_hub_download` begins again after a kill, and compares no sha256 (docs/decisions/0018-libraries.md).
"""

import contextlib
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, get_token, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from agentmesh.errors import ConfigError, ServiceDown
from agentmesh.hub.cache import build_model_folder, model_folder
from agentmesh.hub.download import (
    DownloadDenied,
    Progress,
    download,
    git_blob_of,
    read_url,
    require_disk_space,
    sha256_of,
    without_credentials,
)

MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.txt",
    # how an encoder makes one vector of a text; without them it would be made another way, and nobody would notice
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
}
WEIGHTS = "model.safetensors"
UNKNOWN_REPOSITORY = 401
SHA256_DIGITS = 64


class RemoteFile(NamedTuple):
    """What the hub says of a file.

    Args:
        bytes: its size; 0 is not known.
        sha256: of its content; "" of a small file.
        blob: what git calls its content; "" of a large file.
    """

    bytes: int
    sha256: str
    blob: str


def pull_repository(name: str, downloads: Path, progress: Progress | None) -> Path:
    """The folder of a model, made of the repository's newest revision; weights as safetensors only, for a pickle would run code.

    What the hub's own cache (HF_HOME) holds is linked, not fetched.

    Args:
        name: `org/model`.
        downloads: a folder for files that are not a model yet.

    Raises:
        ServiceDown, ConfigError: as `pull`.
    """
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    token = _token()
    try:
        revision, listing = _cached_listing(name) if is_offline_mode() else _listing(f"{hub}/api/models/{name}", token)
        files = {file: downloads / revision / file for file in _files_needed(name, set(listing))}
        for file, target in files.items():
            _link_from_hub_cache(name, revision, file, target)
        missing = sum(listing[file].bytes - _bytes_on_disk(target) for file, target in files.items())
        downloads.mkdir(parents=True, exist_ok=True)
        require_disk_space(downloads / f"{downloads.name}.part", missing)
        sha256 = {
            file: _fetch(
                f"{hub}/{name}/resolve/{revision}/{urllib.parse.quote(file)}", target, listing[file], token, progress
            )
            for file, target in files.items()
        }
    except DownloadDenied as e:
        raise _denied(name, without_credentials(hub), e.code, has_token=bool(token)) from None
    source = f"{'the cache of' if is_offline_mode() else ''} {without_credentials(hub)} {revision}".strip()
    with build_model_folder(name, source, sha256=sha256) as folder:
        for file, target in files.items():
            _link_or_move(target, folder / file)
    shutil.rmtree(downloads, ignore_errors=True)
    return model_folder(name)


def _token() -> str:
    """Of HF_TOKEN, or of `hf auth login`; "" where there is none."""
    token = get_token() or ""
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigError("HF_TOKEN contains characters that no token has", hint="set it to the token alone")
    return token


def _listing(url: str, token: str) -> tuple[str, Mapping[str, RemoteFile]]:
    """The newest revision, and its files by name. The hub names the sha256 of large ones, and git's name of the others."""
    about = json.loads(read_url(f"{url}/revision/main?blobs=true", token=token))
    files = {}
    for file in about["siblings"]:
        large = file.get("lfs") or {}
        blob = "" if large else str(file.get("blobId") or "")
        files[str(file["rfilename"])] = RemoteFile(int(file.get("size") or 0), str(large.get("sha256", "")), blob)
    return str(about["sha"]), files


def _cached_listing(name: str) -> tuple[str, Mapping[str, RemoteFile]]:
    """The same of the hub's own cache, where the blob that a name links to is called by its digest."""
    try:
        snapshot = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise ServiceDown(
            f"HF_HUB_OFFLINE is set, and the hub's cache {constants.HF_HUB_CACHE!r} has no {name!r}",
            hint="unset HF_HUB_OFFLINE, or point AGENTMESH_CACHE at a copy of a cache that has the model",
        ) from None
    files = {}
    for file in (f for f in snapshot.rglob("*") if f.is_file()):
        digest = file.resolve().name
        large = len(digest) == SHA256_DIGITS
        files[file.relative_to(snapshot).as_posix()] = RemoteFile(
            file.stat().st_size, digest if large else "", "" if large else digest
        )
    return snapshot.name, files


def _link_from_hub_cache(name: str, revision: str, file: str, target: Path) -> None:
    cached = try_to_load_from_cache(name, file, revision=revision)
    if not isinstance(cached, str) or target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(cached), target)
    except OSError:  # another file system, or one without links
        part = target.with_name(f"{target.name}.part")
        with contextlib.suppress(OSError):  # no room: `require_disk_space` says so
            shutil.copyfile(cached, part)
            part.replace(target)


def _fetch(url: str, target: Path, remote: RemoteFile, token: str, progress: Progress | None) -> str:
    """The sha256 of a file that is now at `target`."""
    if target.is_file():
        on_disk = sha256_of(target)
        if remote.sha256 in ("", on_disk) and remote.blob in ("", git_blob_of(target)):
            return on_disk
    if is_offline_mode():
        raise ConfigError(
            f"{target.name} of the hub's cache is damaged or missing", hint="unset HF_HUB_OFFLINE, then pull again"
        )
    return download(url, target, sha256=remote.sha256, blob=remote.blob, token=token, progress=progress)


def _bytes_on_disk(target: Path) -> int:
    """How much of a file is on the disk."""
    return next((f.stat().st_size for f in (target, target.with_name(f"{target.name}.part")) if f.is_file()), 0)


def _link_or_move(file: Path, target: Path) -> None:
    """A link keeps the download until the model is whole, so that a kill does not cost it."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(file, target)
    except OSError:  # a file system without links
        file.rename(target)


def _denied(name: str, hub: str, code: int, *, has_token: bool) -> ConfigError:
    page = f"{hub}/{name}"
    if not has_token:
        return ConfigError(
            f"the hub refuses {name!r} without a token ({code}): it is private, gated, or does not exist",
            hint=f"see {page}, then set HF_TOKEN to a token of your account, or run `hf auth login`",
        )
    source = "in HF_TOKEN" if os.environ.get("HF_TOKEN") else "of `hf auth login`"
    if code == UNKNOWN_REPOSITORY:
        return ConfigError(
            f"the hub rejects the token {source} ({code}), or has no {name!r}", hint=f"create a new token; see {page}"
        )
    return ConfigError(
        f"the account of the token {source} has no access to {name!r} ({code})",
        hint=f"request it, or accept the terms, at {page}",
    )


def _files_needed(name: str, files: set[str]) -> list[str]:
    """What transformers needs of a model's files; the weights once, though some repositories hold them twice."""
    top = {f for f in files if f.endswith(".safetensors") and Path(f).name == f}
    parts = {f for f in top if f.startswith("model-")}
    index = f"{WEIGHTS}.index.json"
    weights = {WEIGHTS} if WEIGHTS in top else {index, *parts} if parts and index in files else set()
    if not weights:
        raise ConfigError(
            f"model {name!r} has no safetensors weights, and agentmesh loads no pickles", hint="choose a model that has"
        )
    if "config.json" not in files:
        raise ConfigError(
            f"model {name!r} has no config.json, which transformers needs", hint="choose a model that has"
        )
    return sorted(files & MODEL_FILES) + sorted(weights)
