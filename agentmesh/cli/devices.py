"""Which GPUs there are and how a process is given one; asks the driver, loads no torch."""

import os
import shutil
import subprocess

from agentmesh.errors import ConfigError
from agentmesh.queue import Queue

CPU = ""
ASK_S = 10.0


def found() -> list[str]:
    """The GPUs that this process may use: of CUDA_VISIBLE_DEVICES, else all that the driver knows; [] without any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    argv = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_S, check=True)
    except (subprocess.SubprocessError, OSError):  # no driver, or one that does not answer
        return []
    return done.stdout.split()


def devices_of(queue: Queue) -> list[str]:
    """The devices of a queue's workers, one each; CPU where there is no GPU.

    Raises:
        ConfigError: it names a GPU that is not here.
    """
    there = found()
    if queue.devices == "all":
        return there or [CPU]
    for wanted in queue.devices:
        if int(wanted) >= len(there):
            raise ConfigError(
                f"queue {queue.name!r} wants GPU {wanted} and this machine has {len(there) or 'none'}; "
                "name those it has, or devices='all'"
            )
    return [there[int(wanted)] for wanted in queue.devices]


def device_env(device: str) -> dict[str, str]:
    """What gives a process one GPU and hides the others."""
    return {} if device == CPU else {"CUDA_VISIBLE_DEVICES": device}
