"""Tensors without memory that take the path of a card: what the program asks, answered for one.

Our code asks whether a tensor is on a card, for the card's compute capability, whether PyTorch has
flash attention, and whom PyTorch would take for attention. Inside `pretended` meta tensors answer
as tensors of that card would, so that the operators that the program calls there are called here,
by any build of PyTorch. What those would do is for PyTorch's own meta kernels to say: names,
arguments, shapes and dtypes are checked by them, values do not exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from anima_fast.models import fused_attention
from anima_fast.models.attention import HALF

aten = torch.ops.aten
# Where PyTorch takes cuDNN's attention before flash attention: data-center Hopper and Blackwell.
CUDNN_ARCHS = (90, 100, 103)
# The efficient attention wants rows of its mask at multiples of so many elements.
MASK_ALIGNMENT = 8


@dataclass(frozen=True)
class Card:
    """A card that is not there.

    Attributes:
        arch: compute capability, 89 for 8.9.
        flash: whether PyTorch has flash attention for it; its builds for Windows have not.
    """

    arch: int = 89
    flash: bool = True

    def attention(self, q: Tensor, mask: Tensor | None = None) -> SDPBackend:
        """Whom `scaled_dot_product_attention` takes for these heads [B, H, L, K]."""
        if q.dtype in HALF and self.arch in CUDNN_ARCHS:
            return SDPBackend.CUDNN_ATTENTION
        if q.dtype in HALF and mask is None and self.flash and self.arch >= 80:
            return SDPBackend.FLASH_ATTENTION
        return SDPBackend.EFFICIENT_ATTENTION


@contextlib.contextmanager
def pretended(card: Card) -> Iterator[None]:
    """Inside the block tensors of the meta device are on `card`."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        # On the meta device PyTorch would write the logits out.
        assert not options, options
        by = card.attention(q, attn_mask)
        if by == SDPBackend.FLASH_ATTENTION:
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        bias = None if attn_mask is None else _expanded(attn_mask, q, k)
        operator = aten._scaled_dot_product_efficient_attention
        if by == SDPBackend.CUDNN_ATTENTION:
            operator = aten._scaled_dot_product_cudnn_attention
        return operator(q, k, v, bias, True)[0]

    def is_cuda(x: Tensor) -> bool:
        return x.device.type in ("cuda", "meta")

    fused_attention._capability.cache_clear()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.Tensor, "is_cuda", property(is_cuda)),
            (torch.cuda, "get_device_capability", lambda *_: divmod(card.arch, 10)),
            (torch.backends.cuda, "is_flash_attention_available", lambda: card.flash),
            (torch, "_fused_sdp_choice", lambda q, *_: card.attention(q).value),
            (F, "scaled_dot_product_attention", attend),
        ):
            stack.enter_context(replaced(owner, name, value))
        try:
            yield
        finally:
            fused_attention._capability.cache_clear()


def _expanded(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as PyTorch prepares it: rows aligned, then broadcast without being written out."""
    keys = mask.shape[-1]
    if keys % MASK_ALIGNMENT:
        mask = F.pad(mask, (0, -keys % MASK_ALIGNMENT))[..., :keys]
    return mask.expand(*q.shape[:3], k.shape[2])


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block; afterwards what it was, inherited or its own."""
    before = vars(owner).get(name, contextlib)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is contextlib:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
