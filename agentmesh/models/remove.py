"""Taking models out of the cache."""

import contextlib
import shutil
import tempfile
from pathlib import Path

from agentmesh.errors import ConfigError, did_you_mean
from agentmesh.models.cache import cache_folder, installed, model_folder, unfinished
from agentmesh.models.hold import holding
from agentmesh.models.pull import downloads_of


def remove(name: str) -> int:
    """How many bytes went with the model and what there was of its downloads.

    Where files may be open and gone (not on Windows), a process that has loaded it goes on with what it has.

    Raises:
        ConfigError: there is nothing of that name, another process is pulling it, or it may not be removed.
    """
    target = model_folder(name)
    with holding(name):
        parts = [p for p in (*unfinished(name), *downloads_of(name)) if p.exists()]
        if not (target.exists() or parts):
            raise ConfigError(
                f"the cache has no model {name!r}.{did_you_mean(name, _known())} `agentmesh models ls` lists them"
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
                f"model {name!r} cannot be removed ({e.strerror}: {e.filename!r}); whoever owns the cache can"
            ) from None
    return freed


def _known() -> list[str]:
    begun = [f.name.replace("--", "/") for f in (cache_folder() / "downloads").glob("*") if f.is_dir()]
    return [*(m.name for m in installed()), *begun]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    with contextlib.suppress(FileNotFoundError):
        return sum(f.stat().st_size for f in files if f.is_file())
    return 0
