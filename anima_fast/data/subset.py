"""A dataset and its subsets, every setting resolved.

Both have the keys of the dataset file as fields, declared in `options/dataset_keys.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from anima_fast.options.dataset_keys import DatasetKeys, SubsetKeys


@dataclass(frozen=True)
class Subset(SubsetKeys):
    """One folder or metadata file. A `caption_extension` of None is ".txt", then ".caption"."""

    index: int = 0
    dataset_index: int = 0

    @property
    def name(self) -> str:
        """The folder's own name, or the metadata file's: what the metadata of a LoRA shows."""
        return Path(os.path.abspath(self.image_dir or self.metadata_file or "")).name

    @property
    def where(self) -> str:
        """The subset's place for messages."""
        return f"datasets[{self.dataset_index}].subsets[{self.index}]"


@dataclass(frozen=True)
class Dataset(DatasetKeys):
    """One resolution and batch size with its subsets. `resolution` is (width, height) in pixels."""

    index: int = 0
    subsets: tuple[Subset, ...] = ()
