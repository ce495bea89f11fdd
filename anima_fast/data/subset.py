"""A dataset and its subsets, every setting resolved."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from anima_fast.data.buckets import BucketRule, Size


@dataclass(frozen=True)
class Subset:
    """One folder or metadata file, every setting resolved. Names are the keys of the file."""

    index: int = 0
    dataset_index: int = 0
    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    is_reg: bool = False
    class_tokens: str | None = None
    # None: ".txt", and ".caption" where there is no such file.
    caption_extension: str | None = None
    cache_info: bool = False
    num_repeats: int = 1
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    resize_interpolation: str | None = None
    exif_rotation: bool = False
    validation_split: float = 0.0
    validation_seed: int | None = None
    custom_attributes: dict = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The folder's own name, or the metadata file's: what the metadata of a LoRA shows."""
        return Path(os.path.abspath(self.image_dir or self.metadata_file or "")).name

    @property
    def where(self) -> str:
        """The subset's place for messages."""
        return f"datasets[{self.dataset_index}].subsets[{self.index}]"


@dataclass(frozen=True)
class Dataset:
    """One resolution and batch size with its subsets. `resolution` is (width, height) in pixels."""

    index: int
    resolution: Size
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    network_multiplier: float = 1.0
    subsets: tuple[Subset, ...] = ()

    @property
    def bucket_rule(self) -> BucketRule:
        """The rule that places an image of this dataset."""
        return BucketRule(
            self.resolution,
            self.enable_bucket,
            self.min_bucket_reso,
            self.max_bucket_reso,
            self.bucket_reso_steps,
            self.bucket_no_upscale,
        )
