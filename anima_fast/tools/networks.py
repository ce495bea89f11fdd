"""Network files (LoRA, LoHa, LoKr, DoRA) as the tools read and write them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from anima_fast.adapters.deltas import Delta
from anima_fast.adapters.formats import FOLDED, read_lora, unfold, write_lora
from anima_fast.adapters.metadata import lora_spec
from anima_fast.adapters.names import DIALECTS
from anima_fast.device import DTYPES
from anima_fast.errors import UserError
from anima_fast.files import check_folder, remove_leftovers
from anima_fast.models.adapter_kinds import LORA, module_of

PRECISIONS = {name: DTYPES[name] for name in ("fp32", "fp16", "bf16")}
# What sd-scripts' tools write where modules differ.
SEVERAL = "Dynamic"


@dataclass(frozen=True)
class NetworkFile:
    """A network file that has been read.

    Attributes:
        deltas: Δ by dotted module name, with its alpha (of a folded file too).
        dialect: that of its names.
        strength: at which a merge uses it.
    """

    path: Path
    deltas: dict[str, Delta]
    dialect: str
    metadata: dict[str, str]
    strength: float = 1.0

    @classmethod
    def read(cls, path: str | os.PathLike, strength: float = 1.0) -> NetworkFile:
        """Read a file of any dialect; `UserError` for other files and numbers not finite."""
        deltas, dialect, metadata = read_lora(path)
        for name, delta in deltas.items():
            if not all(torch.isfinite(tensor).all() for tensor in delta.fields().values()):
                raise UserError(
                    f"{path}: {name} holds numbers that are not finite: its training failed, take "
                    "an earlier file"
                )
        return cls(Path(path), unfold(deltas, metadata), dialect, metadata, strength)

    @property
    def titles(self) -> set[str]:
        """LoRA, LoHa, LoKr, DoRA: those that occur."""
        return {delta.title for delta in self.deltas.values()}

    @property
    def writable(self) -> str:
        """The dialect, kohya for one that can only be read."""
        return self.dialect if self.dialect in DIALECTS else "kohya"

    def write(
        self,
        path: str | os.PathLike,
        deltas: Mapping[str, Delta],
        metadata: Mapping[str, str],
        precision: str | None = None,
    ) -> None:
        """Write modules in this file's dialect and form; None keeps the dtype of each matrix."""
        folded = FOLDED in self.metadata
        write_network(path, deltas, metadata, self.writable, precision, fold_alpha=folded)


def write_network(
    path: str | os.PathLike,
    deltas: Mapping[str, Delta],
    metadata: Mapping[str, str],
    dialect: str = "kohya",
    precision: str | None = None,
    *,
    fold_alpha: bool = False,
) -> None:
    """Write a network file with its ranks and alphas as `ss_network_` keys, and new hashes."""
    if dtype := dtype_of(precision):
        deltas = {name: delta.map(lambda t: t.to(dtype)) for name, delta in deltas.items()}
    metadata = {**metadata, **network_keys(deltas)}
    write_lora(path, deltas, dialect, metadata=metadata, fold_alpha=fold_alpha)


def check_output(output: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> None:
    """Raise `UserError` for an output that cannot be written or is one of the inputs.

    What a killed run left half-written there is deleted.
    """
    output = Path(output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give the name of a file")
    if output.suffix.lower() != ".safetensors":
        raise UserError(f"--output {output}: the name must end with .safetensors")
    for path in inputs:
        if Path(path).resolve() == output.resolve():
            raise UserError(f"--output {output} is one of the inputs: give another name")
    # Checked first, as decompositions take minutes; made only when there is something to write.
    check_folder(next(folder for folder in output.absolute().parents if folder.exists()))
    remove_leftovers(output)


def dtype_of(precision: str | None) -> torch.dtype | None:
    """The dtype of a --precision; None for None. Raises `UserError` for an unknown one."""
    if precision is None:
        return None
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: use {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def network_keys(deltas: Mapping[str, Delta]) -> dict[str, str]:
    """`ss_network_dim` and `ss_network_alpha` of a network."""
    alphas = (d.rank if d.alpha is None else d.alpha.item() for d in deltas.values())
    return {
        "ss_network_dim": _one(delta.rank for delta in deltas.values()),
        "ss_network_alpha": _one(alphas),
    }


def module_key(deltas: Mapping[str, Delta]) -> dict[str, str]:
    """`ss_network_module` of a network that is no longer what its metadata says."""
    dora = any(delta.dora_scale is not None for delta in deltas.values())
    (kind, _), *_ = Counter(delta.kind for delta in deltas.values()).most_common(1)
    return {"ss_network_module": module_of(kind, dora=dora)}


def _one(values: Iterable[float | None]) -> str:
    """The number that all modules share; a LoKr of two full factors has none."""
    found = {value for value in values if value is not None}
    return f"{found.pop():g}" if len(found) == 1 else SEVERAL


def new_metadata(title: str, comment: str, **modelspec: str) -> dict[str, str]:
    """The metadata of a LoRA that was not trained."""
    spec = {**lora_spec(title), "prediction_type": "epsilon", **modelspec}
    return {
        "ss_v2": "False",
        "ss_base_model_version": "anima",
        "ss_network_module": LORA.module,
        "ss_network_args": json.dumps({}),
        "ss_training_comment": comment,
        "ss_output_name": title,
        **{f"modelspec.{key}": value for key, value in spec.items()},
    }


def with_comment(metadata: Mapping[str, str], comment: str) -> dict[str, str]:
    """Metadata with a sentence added to the training comment, as sd-scripts' tools do."""
    old = metadata.get("ss_training_comment", "")
    known = old not in ("", "None")
    return {**metadata, "ss_training_comment": f"{old}; {comment}" if known else comment}
