"""Layers of the 2-D VAE, each able to run on a full map or strip by strip.

A 3x3 convolution needs one row above and one below each output row. Fed strip by strip from top to
bottom it therefore keeps its last two input rows, answers one row late, and sees the zero padding
of the true border only at the first and the last strip. `RowStream` holds those rows for all layers
of one pass: nothing is computed twice, and there is no seam. Without a stream the same layers run
on full maps. With gradients off, norms and activations overwrite tensors that the block made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowStream:
    """What the layers of one pass over strips of rows keep from one strip to the next.

    `last` tells the layer about to run that no row follows its present input.
    """

    def __init__(self) -> None:
        self.last = False
        self._kept: dict[nn.Module, Tensor] = {}

    def window(self, layer: nn.Module, x: Tensor, top: int) -> Tensor:
        """Rows `layer` holds: `top` zero rows or those kept, then x, then one zero row if last."""
        kept = self._kept.pop(layer, None)
        if kept is None and top:
            kept = x.new_zeros(x.shape[0], x.shape[1], top, x.shape[3])
        bottom = x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3]) if self.last else None
        parts = [part for part in (kept, x, bottom) if part is not None]
        return torch.cat(parts, 2) if len(parts) > 1 else x

    def keep(self, layer: nn.Module, rows: Tensor) -> None:
        """Remember rows for the next strip; a copy, as a view would keep the strip alive."""
        if not self.last:
            self._kept[layer] = rows.clone()

    def add_delayed(self, layer: nn.Module, y: Tensor, skip: Tensor) -> Tensor:
        """y plus the oldest rows of the skip path, which runs ahead of y."""
        kept = self._kept.pop(layer, None)
        if kept is not None:
            skip = torch.cat([kept, skip], 2)
        rows = y.shape[2]
        self.keep(layer, skip[:, :, rows:])
        return y.add_(skip[:, :, :rows])


class Conv3x3(nn.Conv2d):
    """3x3 convolution with zero padding 1; with stride 2 it pads right and bottom only."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride=stride)

    def forward(self, x: Tensor, stream: RowStream | None = None) -> Tensor:
        """[B, C, H, W] to [B, O, H/stride, W/stride]; with a stream, the rows ready by now."""
        stride = self.stride[0]
        if stream is None:
            if stride == 1:
                return F.conv2d(x, self.weight, self.bias, padding=1)
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, stride)
        rows = stream.window(self, x, top=1 if stride == 1 else 0)
        ready = max(0, (rows.shape[2] - 3) // stride + 1)
        stream.keep(self, rows[:, :, ready * stride :])
        if not ready:
            return x.new_empty(x.shape[0], self.out_channels, 0, x.shape[3] // stride)
        if stride == 1:
            return F.conv2d(rows, self.weight, self.bias, padding=(0, 1))
        return F.conv2d(F.pad(rows, (0, 1)), self.weight, self.bias, stride)


class ChannelNorm(nn.Module):
    """x / max(‖x‖₂ over channels, 1e-12) · sqrt(C) · gamma, the norm taken in at least float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, *, silu: bool = False, overwrite: bool = False) -> Tensor:
        """Norm, then SiLU if asked; `overwrite` permits reuse of x when no gradient is recorded."""
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
        scale = math.sqrt(x.shape[1]) / length.clamp_min(1e-12)
        # A zero pixel gives 0 · scale: scale must stay finite in half precision.
        scale = scale.clamp_max(torch.finfo(x.dtype).max).to(x.dtype)  # [B, 1, H, W]
        gamma = self.gamma[:, None, None]
        if torch.is_grad_enabled():
            y = x * scale * gamma
            return F.silu(y) if silu else y
        y = (x.mul_(scale) if overwrite else x * scale).mul_(gamma)
        return F.silu(y, inplace=True) if silu else y


class ResBlock(nn.Module):
    """conv(SiLU(norm(conv(SiLU(norm(x)))))) plus x, or plus a 1x1 convolution of x."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(inputs), Conv3x3(inputs, outputs)
        self.norm2, self.conv2 = ChannelNorm(outputs), Conv3x3(outputs, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, stream: RowStream | None = None) -> Tensor:
        """[B, C, H, W] to [B, O, H, W]; with a stream two rows late."""
        h = self.conv1(self.norm1(x, silu=True), stream)
        h = self.conv2(self.norm2(h, silu=True, overwrite=True), stream)
        skip = x if self.shortcut is None else _project(self.shortcut, x)
        return h.add_(skip) if stream is None else stream.add_delayed(self, h, skip)


def _project(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of x, which may have no rows."""
    if not x.shape[2]:
        return x.new_empty(x.shape[0], conv.out_channels, 0, x.shape[3])
    return conv(x)


class SpatialAttention(nn.Module):
    """One attention head of width C over all positions, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, L, 3C]
        q, k, v = (part.unsqueeze(1).contiguous() for part in qkv.chunk(3, -1))  # [B, 1, L, C]
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]
        return self.out(h).add_(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res_in = ResBlock(channels, channels)
        self.attention = SpatialAttention(channels)
        self.res_out = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape; attention needs the full map."""
        return self.res_out(self.attention(self.res_in(x)))


class Upsample(nn.Module):
    """Twice the height and width by repetition, then a convolution that halves the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels // 2)

    def forward(self, x: Tensor, stream: RowStream | None = None) -> Tensor:
        """[B, C, H, W] to [B, C/2, 2H, 2W]."""
        if x.shape[2]:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = x.new_empty(*x.shape[:3], 2 * x.shape[3])
        return self.conv(x, stream)


class Level(nn.Module):
    """The residual blocks of one resolution and the change to the next one, if any."""

    def __init__(self, inputs: int, outputs: int, blocks: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.resample = resample

    def stages(self) -> list[nn.Module]:
        """The layers in order, each callable with (x, stream)."""
        return [*self.blocks, *([self.resample] if self.resample is not None else [])]


class Head(nn.Module):
    """Norm, SiLU and the last convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.conv = ChannelNorm(inputs), Conv3x3(inputs, outputs)

    def forward(self, x: Tensor, stream: RowStream | None = None) -> Tensor:
        """[B, C, H, W] to [B, O, H, W]; may overwrite x when no gradient is recorded."""
        return self.conv(self.norm(x, silu=True, overwrite=True), stream)


# A layer of a row pipeline and how many image rows one of its input rows covers.
Stage = tuple[nn.Module, int]


def run_stages(stages: Sequence[Stage], x: Tensor, chunk_rows: int | None) -> Tensor:
    """All stages one after another: on all of x, or strip by strip when image rows are given.

    No stage sees more than its share of these rows (at least one) plus the two that it kept and the
    zero row of the bottom border, also while the last strip flushes what was held back before.
    """
    if chunk_rows is None:
        for layer, _ in stages:
            x = layer(x, None)
        return x
    return torch.cat(list(_pull(stages, x, chunk_rows, RowStream(), True)), 2)


def _pull(
    stages: Sequence[Stage], x: Tensor, chunk_rows: int, stream: RowStream, last: bool
) -> Iterator[Tensor]:
    """Depth first: a strip goes through all stages before the next one enters."""
    if not stages:
        yield x
        return
    (layer, image_rows), *rest = stages
    rows = max(1, chunk_rows // image_rows)
    # An empty strip still carries the news that it is the last one.
    for start in range(0, max(1, x.shape[2]), rows):
        stream.last = final = last and start + rows >= x.shape[2]
        y = layer(x[:, :, start : start + rows], stream)
        if y.shape[2] or final:
            yield from _pull(rest, y, chunk_rows, stream, final)
