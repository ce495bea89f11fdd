"""Network files (LoRA, LoHa, LoKr, DoRA) as they are read and written again."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from anima_fast import __version__
from anima_fast.adapters.formats import FOLDED, read_lora, unfold, write_lora
from anima_fast.adapters.metadata import IMPLEMENTATION
from anima_fast.adapters.names import DIALECTS
from anima_fast.adapters.parts import Part
from anima_fast.device import DTYPES
from anima_fast.errors import UserError

PRECISIONS = {name: DTYPES[name] for name in ("fp32", "fp16", "bf16")}
# What sd-scripts' tools write where modules differ.
SEVERAL = "Dynamic"
MODULES = {"lora": "networks.lora_anima", "loha": "networks.loha", "lokr": "networks.lokr"}


@dataclass(frozen=True)
class Network:
    """A network file that has been read.

    Attributes:
        parts: by dotted module name, with their alphas (of a folded file too).
        dialect: that of its names.
        folded: whether alpha / rank stood in the weights.
        strength: at which a merge uses it.
    """

    path: Path
    parts: dict[str, Part]
    dialect: str
    metadata: dict[str, str]
    folded: bool
    strength: float = 1.0

    @classmethod
    def read(cls, path: str | os.PathLike, strength: float = 1.0) -> Network:
        """Read a file of any dialect.

        Raises `UserError` when it is no network of this model, or holds numbers that are not
        finite.
        """
        parts, dialect, metadata = read_lora(path)
        for name, part in parts.items():
            if not all(torch.isfinite(tensor).all() for tensor in part.fields().values()):
                raise UserError(
                    f"{path}: {name} holds numbers that are not finite: its training failed, take "
                    "an earlier file"
                )
        folded = FOLDED in metadata
        return cls(Path(path), unfold(parts, metadata), dialect, metadata, folded, strength)

    @property
    def kinds(self) -> set[str]:
        """LoRA, LoHa, LoKr, DoRA: those that occur."""
        return {part.network for part in self.parts.values()}

    def write(
        self,
        path: str | os.PathLike,
        parts: Mapping[str, Part],
        metadata: Mapping[str, str],
        precision: str | None = None,
    ) -> None:
        """Write parts in this file's dialect and form; None keeps the dtype of each matrix.

        A dialect that can only be read becomes kohya. Raises `UserError` when the disk refuses.
        """
        dialect = self.dialect if self.dialect in DIALECTS else "kohya"
        write_network(path, parts, metadata, dialect, precision, fold_alpha=self.folded)


def write_network(
    path: str | os.PathLike,
    parts: Mapping[str, Part],
    metadata: Mapping[str, str],
    dialect: str = "kohya",
    precision: str | None = None,
    *,
    fold_alpha: bool = False,
) -> None:
    """Write a network file with `ss_network_` keys that tell its ranks and alphas, and new hashes.

    Raises `UserError` for an unknown precision, values that are not finite in it, or a full disk.
    """
    if dtype := dtype_of(precision):
        parts = {name: part.map(lambda t: t.to(dtype)) for name, part in parts.items()}
    metadata = {**metadata, **network_keys(parts)}
    write_lora(path, parts, dialect, metadata=metadata, fold_alpha=fold_alpha)


def dtype_of(precision: str | None) -> torch.dtype | None:
    """The dtype of a --precision; None for None. Raises `UserError` for an unknown one."""
    if precision is None:
        return None
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: use {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def network_keys(parts: Mapping[str, Part]) -> dict[str, str]:
    """`ss_network_dim` and `ss_network_alpha` of parts."""
    alphas = (part.rank if part.alpha is None else part.alpha.item() for part in parts.values())
    return {
        "ss_network_dim": _one(part.rank for part in parts.values()),
        "ss_network_alpha": _one(alphas),
    }


def module_key(parts: Mapping[str, Part]) -> dict[str, str]:
    """`ss_network_module` of parts that are not what their metadata says any more."""
    if any(part.dora_scale is not None for part in parts.values()):
        return {"ss_network_module": "lycoris.kohya"}
    kinds = Counter(part.kind for part in parts.values())
    return {"ss_network_module": MODULES[kinds.most_common(1)[0][0]]}


def _one(values: Iterable[float | None]) -> str:
    """The number that all modules share; a LoKr of two whole factors has none."""
    found = {value for value in values if value is not None}
    return f"{found.pop():g}" if len(found) == 1 else SEVERAL


def new_metadata(title: str, comment: str, **modelspec: str) -> dict[str, str]:
    """The metadata of a LoRA that no training run wrote."""
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": "anima-preview/lora",
        "implementation": IMPLEMENTATION,
        "implementation_version": f"anima_fast/{__version__}",
        "title": title,
        "date": datetime.datetime.now().replace(microsecond=0).isoformat(),
        "prediction_type": "epsilon",
        **modelspec,
    }
    return {
        "ss_v2": "False",
        "ss_base_model_version": "anima",
        "ss_network_module": MODULES["lora"],
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
