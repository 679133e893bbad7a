"""What torch says of the devices, as JSON: `python -m agentmesh.inference.probe`, in a process of its own, for drivers may hang."""

import json
import sys
import warnings
from typing import Any

import torch

from agentmesh.inference.device import best_dtype
from agentmesh.inference.kernels import Heads, difference, kernels

USUAL_HEADS = Heads(32, 8, 128)  # Llama's and Qwen's


def probe_devices() -> dict[str, Any]:
    """Torch, its GPUs and the attention kernels that are here.

    Returns:
        torch, cuda: versions, the latter "" for a CPU's build. complaint: why it sees no GPU. bfloat16: whether weights on
        this machine's CPU are. attention: what is wrong with each kernel there is for the CPU, or nothing, the best first.
        gpus: name, capability, why it does not compute, and attention, of each one torch sees.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpus": [_try_device(i) for i in range(torch.cuda.device_count())] if seen else [],
        "complaint": " ".join(str(said[0].message).split()) if said else "",
        "bfloat16": best_dtype("cpu") is torch.bfloat16,
        "attention": _attention(torch.device("cpu"), best_dtype("cpu")),
    }


def _try_device(number: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": torch.cuda.get_device_name(number),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(number)),
        "fails": "",
        "attention": {},
    }
    try:  # a build may lack the kernels of a card that is too old or too new for it
        square = torch.ones(64, 64, device=f"cuda:{number}", dtype=torch.bfloat16)
        float((square @ square).sum())
        found["attention"] = _attention(square.device, square.dtype)
    except Exception as e:
        found["fails"] = f"{type(e).__name__}: {e}".splitlines()[0]
    return found


def _attention(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    return {
        kernel.name: difference(kernel, USUAL_HEADS, device, dtype).partition("\n")[0] for kernel in kernels(device)
    }


if __name__ == "__main__":
    json.dump(probe_devices(), sys.stdout)
