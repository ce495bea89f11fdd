"""LoRA files from one dialect to another."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from anima_fast.adapters import names
from anima_fast.adapters.formats import read_lora, unfold, write_lora
from anima_fast.errors import UserError
from anima_fast.files import check_folder, remove_leftovers


def convert_file(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str | None = None,
    reverse: bool = False,
    fold_alpha: bool = False,
) -> str:
    """Write a LoRA file in another dialect.

    Args:
        src, dst: files; `dst` is replaced atomically.
        to: kohya, comfyui or diffusers; None means comfyui for a kohya file and kohya for others.
        reverse: kohya, as the `--reverse` of sd-scripts' converter.
        fold_alpha: fold alpha / rank into the weights (always so for diffusers).

    Returns:
        The dialect written.

    Raises:
        UserError: no LoRA of this model, the same file twice, a bad path, or a module without such
            a name.
    """
    check_output(dst, [src])
    parts, dialect, metadata = read_lora(src)
    target = "kohya" if reverse else to or ("comfyui" if dialect == "kohya" else "kohya")
    if target not in names.DIALECTS:
        raise UserError(f"the dialect {target} is unknown: use {', '.join(names.DIALECTS)}")
    write_lora(dst, unfold(parts, metadata), target, metadata=metadata, fold_alpha=fold_alpha)
    return target


def check_output(output: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> Path:
    """The output path, refused when it cannot be written or is one of the inputs.

    What a killed run left half-written there is deleted. Raises `UserError`.
    """
    output = Path(output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give the name of a file")
    if output.suffix.lower() != ".safetensors":
        raise UserError(f"--output {output}: the name must end with .safetensors")
    for path in inputs:
        if Path(path).resolve() == output.resolve():
            raise UserError(f"--output {output} is one of the inputs: give another name")
    # Decompositions take minutes; a folder is not made before there is something to put in it.
    check_folder(next(folder for folder in output.absolute().parents if folder.exists()))
    remove_leftovers(output)
    return output
