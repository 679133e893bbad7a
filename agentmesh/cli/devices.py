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
    done = ask_driver("--query-gpu=index", "--format=csv,noheader")
    return [] if done is None or done.returncode else done.stdout.split()


def ask_driver(*args: str) -> "subprocess.CompletedProcess[str] | None":
    """What nvidia-smi says; None where there is none, code 1 where it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    argv = ["nvidia-smi", *args]
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (subprocess.SubprocessError, OSError) as e:
        return subprocess.CompletedProcess(argv, 1, "", str(e))


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
