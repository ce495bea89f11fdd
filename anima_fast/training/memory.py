"""How much memory a run takes, as the operating system or the CUDA allocator counts it."""

from __future__ import annotations

import sys

import torch


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory so far in MiB: the CUDA allocator's, else the process's; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        # Windows has no resource module.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB on Linux.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
