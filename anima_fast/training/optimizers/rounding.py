"""Stochastic rounding of float32 to bfloat16: right on average, where rounding to nearest is not.

A bfloat16 weight w has steps of about |w| / 256. An update below half a step vanishes when it is
rounded to nearest, every time. Here x = a + r·(b − a) between two neighbours a and b becomes b with
probability r, so E[round(x)] = x and small updates add up (Gupta et al. 2015, arXiv 1502.02551).

bfloat16 is the upper half of a float32: adding a random number below 2¹⁶ to the bits and cutting
the lower half off does exactly that, for either sign, as the bits after it are the magnitude's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anima_fast.data.seeding import seeded

LOWER_BITS = 16


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (float32) as bfloat16, rounded at random; bfloat16 numbers stay as they are.

    Args:
        x: [...], any shape; infinities and NaN come back as such.
        generator: of x's device.

    Returns:
        [...] bfloat16.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}, expected float32")
    bits = torch.randint(
        0, 1 << LOWER_BITS, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    bits += x.view(torch.int32)
    bits &= -(1 << LOWER_BITS)
    rounded = bits.view(torch.float32)
    # A NaN whose bits are all ones would become a number.
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def rounding_generator(device: torch.device, *key: object) -> torch.Generator:
    """The generator of one rounding, which follows from its key (seed, step, name) alone."""
    return torch.Generator(device).manual_seed(seeded("rounding", *key).getrandbits(63))
