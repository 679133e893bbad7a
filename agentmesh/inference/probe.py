"""A probe of torch and its devices, printed as JSON: `python -m agentmesh.inference.probe`, a process because drivers may hang."""

import json
import sys
import warnings
from typing import Any

import torch

from agentmesh.inference.device import best_dtype
from agentmesh.inference.kernels import Heads, difference, kernels

USUAL_HEADS = Heads(32, 8, 128)  # Llama's and Qwen's


def probe_devices() -> dict[str, Any]:
    """Torch, its GPUs and the attention kernels of this machine.

    Returns:
        torch, cuda: versions, the latter "" for a build without CUDA. complaint: why torch sees no GPU. bfloat16: whether
        weights on this machine's CPU have that type. attention: for each kernel of the CPU, the best first, how it differs
        from the formula, or "". gpus: of each GPU its name, capability, why it fails to compute, and attention.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpus": [_try_device(i) for i in range(torch.cuda.device_count())] if seen else [],
        "complaint": " ".join(str(caught[0].message).split()) if caught else "",
        "bfloat16": best_dtype("cpu") is torch.bfloat16,
        "attention": _attention(torch.device("cpu"), best_dtype("cpu")),
    }


def _try_device(number: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": torch.cuda.get_device_name(number),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(number)),
        "fails": "",
        "attention": {},
    }
    try:  # a build may lack the kernels of a card that is too old or too new for it
        square = torch.ones(64, 64, device=f"cuda:{number}", dtype=torch.bfloat16)
        float((square @ square).sum())
        result["attention"] = _attention(square.device, square.dtype)
    except Exception as e:
        result["fails"] = f"{type(e).__name__}: {e}".splitlines()[0]
    return result


def _attention(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    return {
        kernel.name: difference(kernel, USUAL_HEADS, device, dtype).partition("\n")[0] for kernel in kernels(device)
    }


if __name__ == "__main__":
    json.dump(probe_devices(), sys.stdout)
