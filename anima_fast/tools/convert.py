"""A network file in another dialect: `anima-fast convert`."""

from __future__ import annotations

import os

from anima_fast.adapters import names
from anima_fast.adapters.formats import read_lora, unfold, write_lora
from anima_fast.errors import UserError
from anima_fast.tools.networks import check_output


def convert_file(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str | None = None,
    reverse: bool = False,
    fold_alpha: bool = False,
) -> str:
    """Write a network file in another dialect; returns which.

    Args:
        src, dst: files; `dst` is replaced atomically.
        to: kohya, comfyui or diffusers; None means comfyui for a kohya file and kohya for others.
        reverse: kohya, as the `--reverse` of sd-scripts' converter.
        fold_alpha: fold alpha / rank into the weights (always for diffusers).

    Raises `UserError` for no LoRA of this model, and for a module without such a name.
    """
    check_output(dst, [src])
    deltas, dialect, metadata = read_lora(src)
    target = "kohya" if reverse else to or ("comfyui" if dialect == "kohya" else "kohya")
    if target not in names.DIALECTS:
        raise UserError(f"the dialect {target} is unknown: use {', '.join(names.DIALECTS)}")
    write_lora(dst, unfold(deltas, metadata), target, metadata=metadata, fold_alpha=fold_alpha)
    return target
