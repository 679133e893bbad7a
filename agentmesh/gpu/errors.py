"""What torch's errors mean for a process that has a device."""

import torch

LIBRARIES = ("CUDA", "cuDNN", "CUBLAS")  # a RuntimeError with their names in it is all there is to go by


def breaks_device(error: Exception) -> bool:
    """Whether nothing in this process can use its device again."""
    return not isinstance(error, torch.OutOfMemoryError) and any(name in str(error) for name in LIBRARIES)
