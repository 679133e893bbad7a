"""What a device's memory holds."""

from typing import NamedTuple

import psutil
import torch


class Memory(NamedTuple):
    """In bytes.

    Args:
        used: what this process holds of the machine's memory.
        free, all: of a GPU, whoever uses the rest; 0 on a CPU.
    """

    used: int
    free: int = 0
    all: int = 0


def memory_of(device: torch.device) -> Memory:
    """As it is now."""
    used = psutil.Process().memory_info().rss
    return Memory(used, *torch.cuda.mem_get_info(device)) if device.type == "cuda" else Memory(used)
