"""Attention with any number of all-zero key rows, behind one function for every backend.

    out_i = Σ_j e^{s_ij} v_j / (Σ_j e^{s_ij} + n),   s = q kᵀ / √K

n = `zero_keys` counts further rows whose key and value are zero: their logit is 0 and they add
nothing to the numerator. Anima pads its text to 512 such rows and attends to them. A negative n
leaves out that many zero rows at the end of k and v: a batch is as wide as its longest text, and
next to one of 600 rows a text of 75 has 525 zero rows, 88 more than the 437 that belong to it.

PyTorch's attention gets a few zero keys whose logits, added through the mask, make Σ e^{logit} = n:
one key with log n where that is exact enough, three in 16 bit, where log n alone would be off by up
to 1.6 %. The other backends have no mask and get the n rows written out.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from anima_fast.device import check_triton
from anima_fast.errors import UserError

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Library:
    """An attention of another package, and the extra that installs it."""

    package: str
    extra: str
    function: str
    options: Mapping[str, str] = field(default_factory=dict)
    needs_half: bool = True
    has_backward: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: ZeroRows | None) -> Tensor:
        """Its result; the zero rows, as many for all samples, are written out."""
        module, _, name = self.function.rpartition(".")
        count = rows.counts[0] if rows else 0
        run = getattr(importlib.import_module(module), name)
        return run(q, _padded(k, count), _padded(v, count), **self.options)


LIBRARIES = {
    "xformers": Library(
        "xformers", "xformers", "xformers.ops.memory_efficient_attention", needs_half=False
    ),
    "flash": Library("flash_attn", "flash", "flash_attn.flash_attn_func"),
    "sageattn": Library(
        "sageattention", "sage", "sageattention.sageattn", {"tensor_layout": "NHD"},
        has_backward=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ZeroRows:
    """The all-zero key rows of a batch, prepared once for all blocks of a forward."""

    counts: tuple[int, ...]
    logits: Tensor  # [B, 1, 1, J], of J zero keys that stand for them
    on_device: Tensor  # the counts, [B] int32

    @property
    def leaves_out(self) -> bool:
        """Some sample does not see all of its keys."""
        return min(self.counts) < 0

    def sample(self, index: int) -> ZeroRows | None:
        """The zero rows of one sample, or None."""
        if self.counts[index] <= 0:
            return None
        one = slice(index, index + 1)
        return ZeroRows(self.counts[one], self.logits[one], self.on_device[one])

    def kept(self, index: int, keys: int) -> int:
        """How many of its `keys` a sample sees."""
        return keys + min(self.counts[index], 0)


ZeroKeys: TypeAlias = int | Sequence[int] | Tensor | ZeroRows | None
# (q, k, v, rows) -> out
Backend = Callable[[Tensor, Tensor, Tensor, ZeroRows | None], Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    zero_keys: ZeroKeys = None,
    mode: str = "torch",
    split: bool = False,
) -> Tensor:
    """Softmax attention over the keys and `zero_keys` further zero rows: [B, L, H, K] in q's dtype.

    Args:
        q: [B, L, H, K], any float dtype (16 bit for flash and sageattn).
        k, v: [B, S, H, K] in q's dtype.
        zero_keys: None (no rows), one count for all samples, one per sample [B], or prepared rows;
            a sample's count may be negative down to 1 − S where its last rows are zero.
        mode: torch (also sdpa), triton, xformers, flash or sageattn; see `check_attn_mode`.
        split: one sample at a time, to save memory.

    Raises `ValueError` for an unknown mode, or counts that do not fit the batch.
    """
    if mode not in _BACKENDS:
        raise ValueError(f"attention mode {mode!r}, expected one of {', '.join(_BACKENDS)}")
    run = _BACKENDS[mode]
    rows = prepare_zero_rows(zero_keys, len(q), q.dtype, q.device)
    if rows is not None and min(rows.counts) <= -k.shape[1]:
        raise ValueError(f"zero_keys is {rows.counts}, which leaves no key of {k.shape[1]}")
    if len(q) == 1:
        return _one_sample(run, q, k, v, rows, 0)
    if split or _is_uneven(run, rows):
        return torch.cat([_one_sample(run, q, k, v, rows, index) for index in range(len(q))])
    return run(q, k, v, rows)


def _is_uneven(run: Backend, rows: ZeroRows | None) -> bool:
    """Whether a backend cannot give each sample its own zero rows in one call."""
    if rows is None or run is _torch:
        return False
    return rows.leaves_out or (run is not _triton and len(set(rows.counts)) > 1)


def _one_sample(
    run: Backend, q: Tensor, k: Tensor, v: Tensor, rows: ZeroRows | None, index: int
) -> Tensor:
    """[1, L, H, K] of one sample, without the keys that it leaves out."""
    one = slice(index, index + 1)
    if rows is None:
        return run(q[one], k[one], v[one], None)
    seen = rows.kept(index, k.shape[1])
    return run(q[one], k[one, :seen], v[one, :seen], rows.sample(index))


def prepare_zero_rows(
    zero_keys: ZeroKeys, batch: int, dtype: torch.dtype, device: torch.device | str
) -> ZeroRows | None:
    """`zero_keys` in any of its forms; None when there are no zero rows.

    A tensor of counts on a card is read once here, not once per block. Raises `ValueError` for
    counts that do not fit the batch.
    """
    if zero_keys is None or isinstance(zero_keys, ZeroRows):
        return zero_keys
    given = zero_keys.tolist() if isinstance(zero_keys, Tensor) else zero_keys
    counts = [given] * batch if isinstance(given, int) else [int(n) for n in given]
    if len(counts) != batch:
        raise ValueError(f"zero_keys is {counts}, expected {batch} counts")
    if not any(counts):
        return None
    logits = torch.tensor([zero_logits(n, dtype) for n in counts], dtype=dtype)
    on_device = torch.tensor(counts, dtype=torch.int32)
    if torch.device(device).type == "cuda":
        # From page-locked memory, or the copies would wait for everything launched before.
        logits, on_device = (
            t.pin_memory().to(device, non_blocking=True) for t in (logits, on_device)
        )
    return ZeroRows(tuple(counts), logits[:, None, None, :], on_device)


def zero_logits(count: int, dtype: torch.dtype) -> list[float]:
    """Logits of the zero keys that stand for `count` rows, each exact in `dtype` where it is short.

    Greedy: each logit is log of what is left, rounded down to the dtype; after three the sum is
    within 1e-5 of the count in bfloat16. No key stands for a count of 0 or less.
    """
    count = max(count, 0)
    if dtype not in HALF:
        return [math.log(count) if count else -math.inf]
    left, logits = float(count), []
    for _ in range(3):
        logits.append(_floor(math.log(left), dtype) if left > 1e-6 * count else -math.inf)
        left -= math.exp(logits[-1])
    return logits


def _floor(x: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is not above `x`."""
    if x == 0:
        return x
    step = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(x)))
    return math.floor(x / step) * step


def _torch(q: Tensor, k: Tensor, v: Tensor, rows: ZeroRows | None) -> Tensor:
    bias = None
    if rows is not None:
        slots = rows.logits.shape[-1]
        # The mask broadcasts over heads and queries: it is never written out at [L, S].
        bias = F.pad(rows.logits.to(q.dtype), (k.shape[1], 0))  # [B, 1, 1, S + J]
        for sample, count in enumerate(rows.counts):
            if count < 0:
                bias[sample, ..., k.shape[1] + count : k.shape[1]] = -math.inf
        k, v = _padded(k, slots), _padded(v, slots)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, K]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _padded(x: Tensor, count: int) -> Tensor:
    """[B, S, H, K] → [B, S + count, H, K], the new rows zero."""
    return F.pad(x, (0, 0, 0, 0, 0, count)) if count else x


def _triton(q: Tensor, k: Tensor, v: Tensor, rows: ZeroRows | None) -> Tensor:
    # Imported here so that the other backends run without Triton.
    from anima_fast.kernels.attention import attention as triton_attention

    return triton_attention(q, k, v, None if rows is None else rows.on_device)


_BACKENDS: dict[str, Backend] = {
    "torch": _torch, "sdpa": _torch, "triton": _triton, **LIBRARIES,
}  # fmt: skip


def check_attn_mode(
    mode: str,
    *,
    training: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse a backend that cannot be used, with the remedy; device and dtype, when known."""
    if mode in ("torch", "sdpa"):
        return
    if mode == "triton":
        check_triton(f"--attn_mode {mode}", "--attn_mode torch", device)
        return
    if mode not in LIBRARIES:
        known = ", ".join(name for name in _BACKENDS if name != "sdpa")
        raise UserError(f"--attn_mode {mode} is unknown: use one of {known}")
    library = LIBRARIES[mode]
    if training and not library.has_backward:
        raise UserError(f"--attn_mode {mode} has no backward pass: use torch or flash to train")
    package = library.package
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise UserError(
            f"--attn_mode {mode} needs the package {package}: pip install "
            f'"anima-fast[{library.extra}]", or use --attn_mode torch'
        )
    if device is not None and torch.device(device).type != "cuda":
        raise UserError(f"--attn_mode {mode} needs a CUDA card: use --attn_mode torch here")
    if library.needs_half and dtype is not None and dtype not in HALF:
        raise UserError(
            f"--attn_mode {mode} works in 16 bit only: use bf16 or fp16 (--mixed_precision, in "
            "`sample` --dtype), or --attn_mode torch"
        )
