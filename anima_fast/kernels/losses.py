"""The losses of rectified flow, element by element: their only definition, in plain torch.

Imports nothing, so that --help, which names them, does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOSS_TYPES = ("l2", "l1", "huber", "smooth_l1")


def element_loss(d: Tensor, loss_type: str = "l2", c: Tensor | None = None) -> Tensor:
    """The unreduced loss ℓ(d) of the error d [B, ...], in its shape and dtype (float32 or float64).

    l2 d²; l1 |d|; huber 2c(√(d² + c²) − c); smooth_l1 2(√(d² + c²) − c), with a threshold c [B].
    Raises `ValueError` for an unknown type, or no c where it is needed.
    """
    if loss_type == "l2":
        return d**2
    if loss_type == "l1":
        return d.abs()
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
    if c is None:
        raise ValueError(f"{loss_type} needs c, one threshold per sample")
    c = per_sample(c, d)
    loss = 2 * ((d**2 + c**2).sqrt() - c)
    return c * loss if loss_type == "huber" else loss


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ..., 1] on the device and in the dtype of `like`."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
