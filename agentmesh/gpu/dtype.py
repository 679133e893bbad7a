"""In which numbers a model's weights are held on a device."""

import torch


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU, and where the processor multiplies it in hardware; else float32."""
    if device == "cuda":
        return torch.bfloat16
    # torch names the best vector unit, not AMX or AVX512_BF16: ask for those by their own name
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if probe() or amx() else torch.float32
