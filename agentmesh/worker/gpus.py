"""The GPUs of this machine, and how a process gets one; asks the driver, loads no torch."""

import os
import shutil
import subprocess

from agentmesh.definitions.queue import DeviceQueue
from agentmesh.errors import ConfigError

CPU = ""
DRIVER_TIMEOUT_S = 10.0


def visible_gpus() -> list[str]:
    """The GPUs that this process may use: CUDA_VISIBLE_DEVICES, else all of the driver's; [] without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    done = nvidia_smi("--query-gpu=index", "--format=csv,noheader")
    return [] if done is None or done.returncode else done.stdout.split()


def nvidia_smi(*args: str) -> "subprocess.CompletedProcess[str] | None":
    """The output of nvidia-smi; None where it is not installed, code 1 where it does not respond."""
    if shutil.which("nvidia-smi") is None:
        return None
    argv = ["nvidia-smi", *args]
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S, check=False)
    except (subprocess.SubprocessError, OSError) as e:
        return subprocess.CompletedProcess(argv, 1, "", str(e))


def devices_of(queue: DeviceQueue) -> list[str]:
    """The devices of a queue's workers, one each; CPU where there is no GPU.

    Raises:
        ConfigError: the queue names a GPU that this machine does not have.
    """
    gpus = visible_gpus()
    if queue.devices == "all":
        return gpus or [CPU]
    for requested in queue.devices:
        if int(requested) >= len(gpus):
            raise ConfigError(
                f"queue {queue.name!r} wants GPU {requested} and this machine has {len(gpus) or 'none'}",
                hint="name GPUs of this machine, or write devices='all'",
            )
    return [gpus[int(requested)] for requested in queue.devices]


def device_env(device: str) -> dict[str, str]:
    """The environment that gives a process one GPU and hides the others."""
    return {} if device == CPU else {"CUDA_VISIBLE_DEVICES": device}
