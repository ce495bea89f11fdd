"""The hashes that user interfaces know LoRA files and base models by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from torch import Tensor

# The legacy hash reads 64 KiB at 1 MiB.
LEGACY_OFFSET, LEGACY_LENGTH = 0x100000, 0x10000


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with `sshs_model_hash` and `sshs_legacy_hash` of these tensors.

    Both are taken over a safetensors serialisation that holds only the `ss_` metadata: the first is
    SHA-256 of the bytes after the header, the second the start of SHA-256 over 64 KiB at 1 MiB.
    """
    from safetensors.torch import save

    plain = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    ss_only = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    data = save(plain, metadata=ss_only)
    header = 8 + int.from_bytes(data[:8], "little")
    legacy = data[LEGACY_OFFSET : LEGACY_OFFSET + LEGACY_LENGTH]
    return {
        **metadata,
        "sshs_model_hash": hashlib.sha256(memoryview(data)[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def legacy_file_hash(path: str | os.PathLike) -> str:
    """First 8 hex digits of SHA-256 over 64 KiB at 1 MiB of a file (`ss_sd_model_hash`)."""
    with open(path, "rb") as file:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]
