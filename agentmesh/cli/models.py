"""`agentmesh models`: pull models into the cache with a progress bar, list them, remove them."""

import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from agentmesh.errors import ExtraMissing
from agentmesh.hub.cache import installed_models, is_installed, model_folder
from agentmesh.runtime.process_exit import interruptible


def pull_model(name: str) -> int:
    """Download one model unless it is in the cache, and print its folder."""
    print(f"{name}: {model_folder(name) if is_installed(name) else _pull(name)}")
    return 0


def _pull(name: str) -> Path:
    try:
        from agentmesh.hub.pull import pull
    except ImportError as e:
        raise ExtraMissing(
            f"local models need {e.name}, which is not installed", hint="pip install 'agentmesh-celery[local]'"
        ) from None
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with interruptible(), Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, int] = {}

        def progress(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file, total=total or None)
            bar.update(tasks[file], completed=done, total=total or None)  # type: ignore[arg-type]  # TaskID is an int

        return pull(name, progress=progress)


def remove_model(name: str, *, as_json: bool) -> int:
    """Remove one model from the cache."""
    from agentmesh.hub.pull import remove_cached  # late: its dependencies take a while to load

    freed = remove_cached(name)
    print(json.dumps({"name": name, "bytes": freed}) if as_json else f"{name}: removed, {freed / 1e6:.0f} MB")
    return 0


def list_models(*, as_json: bool) -> int:
    """Print the models in the cache, with their sizes and sources."""
    for model in installed_models():
        if as_json:
            print(json.dumps({"name": model.name, "bytes": model.bytes, "source": model.source}))
        else:
            print(f"{model.name:<40} {model.bytes / 1e6:8.0f} MB  {model.source}")
    return 0
