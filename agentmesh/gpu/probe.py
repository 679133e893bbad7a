"""What torch says of the devices, as JSON: `python -m agentmesh.gpu.probe`, a process of its own, for drivers may hang."""

import importlib.metadata
import importlib.util
import json
import sys
import warnings
from typing import Any

import torch

from agentmesh.gpu.load import best_dtype

# torch's own attention over packed sequences, where there is one
VARLEN = "torch.nn.attention.varlen"


def probed() -> dict[str, Any]:
    """Torch, its GPUs and the attention kernels that are here.

    Returns:
        torch, cuda: versions, the latter "" for a CPU's build. gpus: name, capability and whether it computes, for each
        one torch sees. complaint: why it sees none. flash: the flash_attn wheel's version or "". varlen: whether torch has
        such a kernel. bfloat16: whether weights on this machine's CPU are.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpus": [_tried(i) for i in range(torch.cuda.device_count())] if seen else [],
        "complaint": " ".join(str(said[0].message).split()) if said else "",
        "flash": importlib.metadata.version("flash_attn") if importlib.util.find_spec("flash_attn") else "",
        "varlen": importlib.util.find_spec(VARLEN) is not None,
        "bfloat16": best_dtype("cpu") is torch.bfloat16,
    }


def _tried(number: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": torch.cuda.get_device_name(number),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(number)),
        "fails": "",
    }
    try:  # a build may lack the kernels of a card that is too old or too new for it
        square = torch.ones(64, 64, device=f"cuda:{number}", dtype=torch.bfloat16)
        float((square @ square).sum())
    except Exception as e:
        found["fails"] = f"{type(e).__name__}: {e}".splitlines()[0]
    return found


if __name__ == "__main__":
    json.dump(probed(), sys.stdout)
