"""Attention with any number of all-zero key rows, behind one function for every backend.

    out_i = Σ_j e^{s_ij} v_j / (Σ_j e^{s_ij} + n),   s = q kᵀ / √K

n = `zero_keys` counts further rows whose key and value are zero: their logit is 0 and they add
nothing to the numerator. Anima pads its text to 512 such rows and attends to them.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anima_fast.errors import UserError

ATTN_MODES = ("torch", "xformers", "flash", "sageattn")
PACKAGES = {
    "xformers": ("xformers", "xformers"),
    "flash": ("flash_attn", "flash"),
    "sageattn": ("sageattention", "sage"),
}
ZeroKeys = int | Sequence[int] | Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    zero_keys: ZeroKeys = None,
    mode: str = "torch",
    split: bool = False,
) -> Tensor:
    """Softmax attention over the keys and `zero_keys` further zero rows.

    Args:
        q: [B, L, H, K], any float dtype.
        k, v: [B, S, H, K], brought to q's dtype by the caller.
        zero_keys: None (none), one count for all samples, or one per sample [B].
        mode: torch, xformers, flash or sageattn (see `check_attn_mode`).
        split: one sample at a time, to save memory.

    Returns:
        [B, L, H, K] in q's dtype.

    Raises:
        ValueError: unknown mode, or counts that do not fit the batch.
    """
    if mode not in _BACKENDS:
        raise ValueError(f"attention mode {mode!r}, expected one of {', '.join(_BACKENDS)}")
    counts = zero_key_counts(zero_keys, len(q))
    uniform = len(set(counts)) == 1
    if len(q) > 1 and (split or (mode != "torch" and not uniform)):
        rows = [
            attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], zero_keys=counts[i], mode=mode)
            for i in range(len(q))
        ]
        return torch.cat(rows)
    return _BACKENDS[mode](q, k, v, counts)


def zero_key_counts(zero_keys: ZeroKeys, batch: int) -> list[int]:
    """`zero_keys` in any of its forms as one count per sample."""
    if zero_keys is None:
        return [0] * batch
    if isinstance(zero_keys, Tensor):
        zero_keys = zero_keys.tolist()
    counts = [zero_keys] * batch if isinstance(zero_keys, int) else [int(n) for n in zero_keys]
    if len(counts) != batch or min(counts, default=0) < 0:
        raise ValueError(f"zero_keys is {counts}, expected {batch} counts of 0 or more")
    return counts


def _torch(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, K]
    bias = None
    if any(counts):
        # One zero key with logit log(n) stands for n zero keys with logit 0.
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        logs = [math.log(n) if n else -math.inf for n in counts]
        bias = q.new_zeros(len(q), 1, 1, k.shape[2])
        bias[:, 0, 0, -1] = torch.tensor(logs, dtype=q.dtype, device=q.device)
        bias = bias.expand(-1, q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _padded(x: Tensor, counts: list[int]) -> Tensor:
    """[B, S, H, K] with its zero rows written out; the counts are equal."""
    return F.pad(x, (0, 0, 0, 0, 0, counts[0])) if counts[0] else x


def _xformers(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    return ops.memory_efficient_attention(q, _padded(k, counts), _padded(v, counts))


def _flash(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    flash = importlib.import_module("flash_attn")
    return flash.flash_attn_func(q, _padded(k, counts), _padded(v, counts))


def _sageattn(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    sage = importlib.import_module("sageattention")
    return sage.sageattn(q, _padded(k, counts), _padded(v, counts), tensor_layout="NHD")


_BACKENDS: dict[str, Callable] = {
    "torch": _torch,
    "sdpa": _torch,
    "xformers": _xformers,
    "flash": _flash,
    "sageattn": _sageattn,
}


def check_attn_mode(mode: str, *, training: bool, device: torch.device | str | None = None) -> None:
    """Refuse a backend that cannot be used, with the remedy.

    Raises `UserError`: sageattn for training (it has no backward pass), a package that is not
    installed (naming the extra), or a device that the package does not support.
    """
    if mode in ("torch", "sdpa"):
        return
    if mode not in PACKAGES:
        raise UserError(f"--attn_mode {mode} is unknown: use one of {', '.join(ATTN_MODES)}")
    if mode == "sageattn" and training:
        raise UserError("--attn_mode sageattn has no backward pass: use torch or flash to train")
    package, extra = PACKAGES[mode]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f'--attn_mode {mode} needs the package {package}: pip install "anima-fast[{extra}]", '
            "or use --attn_mode torch"
        )
    if device is not None and torch.device(device).type != "cuda":
        raise UserError(f"--attn_mode {mode} needs a CUDA card: use --attn_mode torch here")


def check_torch_version(version: str = torch.__version__) -> None:
    """Refuse PyTorch below 2.5, whose attention gives NaN for fully masked rows."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (2, 5):
        raise UserError(
            f"PyTorch {version} is too old: before 2.5 its attention gives NaN (NaN loss, black "
            "images); pip install -U torch"
        )
