"""One process at a time fills or removes a model of the cache. The lock is the kernel's and goes with its process."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from agentmesh.errors import ConfigError
from agentmesh.models.cache import cache_folder, model_folder

try:
    import fcntl
except ImportError:  # Windows: there two at once are not kept apart
    fcntl = None  # type: ignore[assignment]  # the type of what is missing


@contextlib.contextmanager
def holding(name: str, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, no other process pulls or removes this model.

    Args:
        waiting: told when another has it, which is then waited for; None does not wait.

    Raises:
        ConfigError: another has it, and nobody wants to wait; or the cache cannot be written.
    """
    path = cache_folder() / "downloads" / f"{model_folder(name).name}.lock"
    while True:
        handle = _opened(path)
        try:
            _lock(handle, name, waiting)
            if _is_at(handle, path):  # else who had it took the file along: whoever comes now has another
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(handle)


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise ConfigError(
            f"the cache of models {str(cache_folder())!r} cannot be written ({e.strerror}); set AGENTMESH_CACHE to a folder that can"
        ) from None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _lock(handle: int, name: str, waiting: Callable[[], None] | None) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise ConfigError(
                f"another process is pulling model {name!r}; wait until it has ended, or stop it, then remove the model"
            ) from None
        waiting()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system that knows no locks, as some of networks
        return
