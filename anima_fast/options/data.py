"""Model files, dataset, captions, image preparation, caches and masks.

Classes named `...Keys` are shared with `dataset_keys.py`: each field is an option of the run and a
key of the dataset file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from anima_fast.options.declare import option

_model = partial(option, "Model files")
_data = partial(option, "Dataset")
_caption = partial(option, "Captions")
_image = partial(option, "Images and buckets")
_cache = partial(option, "Caches")
_mask = partial(option, "Masked loss")


@dataclass(frozen=True)
class ModelFiles:
    """The networks other than the DiT, and the tokenizers."""

    qwen3: str | None = _model(
        None, "Qwen3-0.6B text encoder: a Hugging Face folder or one .safetensors file (required)."
    )
    vae: str | None = _model(None, "Qwen-Image VAE, .safetensors or .pth (required).")
    llm_adapter_path: str | None = _model(
        None, "Separate LLM adapter file, for a DiT file without one."
    )
    qwen3_tokenizer_path: str | None = _model(
        None,
        "Folder with the Qwen3 tokenizer (default: the encoder's own, then the models folder).",
    )
    t5_tokenizer_path: str | None = _model(
        None,
        "Folder with the T5 tokenizer; only its token ids are used (default: the models folder).",
    )
    models_dir: str | None = _model(
        None, "Models folder that `anima-fast download` fills (default: the user's cache folder)."
    )
    vae_chunk_size: int | None = _model(
        None,
        "Rows of pixels that the VAE works on at a time, to save memory; even, None = all.",
        low=1,
    )


@dataclass(frozen=True)
class TrainedModel:
    """The network that is trained or adapted."""

    pretrained_model_name_or_path: str | None = _model(
        None, "Anima DiT, one .safetensors file (required)."
    )


@dataclass(frozen=True)
class ModelOptions(ModelFiles, TrainedModel):
    """All networks, and how the VAE and the text encoder run."""

    qwen3_max_token_length: int = _model(512, "Qwen3 tokens kept of a caption.", low=1)
    t5_max_token_length: int = _model(512, "T5 tokens kept of a caption.", low=1)
    vae_disable_cache: bool = _model(
        False, "Accepted; always so: one image needs no causal feature cache."
    )
    qwen_image_vae_2d: bool = _model(False, "Accepted; always so: the VAE here is two-dimensional.")
    no_half_vae: bool = _model(False, "Run the VAE in float32 instead of the mixed precision.")


@dataclass(frozen=True)
class DatasetOptions:
    """Where images and captions are; most keys of the dataset file have their default here."""

    dataset_config: str | None = _data(
        None, "Dataset file, TOML or JSON; then train_data_dir, reg_data_dir, in_json are ignored."
    )
    train_data_dir: str | None = _data(None, "Folder with folders named N_class (N repeats).")
    reg_data_dir: str | None = _data(None, "The same for regularisation images.")
    in_json: str | None = _data(None, "Metadata file with captions, instead of caption files.")
    resolution: str | None = _data(
        None, 'Area of the images, "1024" or "width,height"; needed without a dataset file.',
        kind="size", low=16, high=16384,
    )  # fmt: skip
    skip_image_resolution: str | None = _data(
        None, 'Leave out images of at most this area, "512" or "width,height".',
        kind="size", low=1, high=16384,
    )  # fmt: skip
    train_batch_size: int = _data(1, "Images per batch.", low=1, high=65536)
    dataset_repeats: int = _data(1, "Times each image is used in an epoch.", low=0, high=100_000)
    prior_loss_weight: float = _data(1.0, "Loss factor of regularisation images.", low=0)
    max_data_loader_n_workers: int = _data(
        8, "Threads that read and decode images; 0 = only the main one.", low=0
    )
    cache_info: bool = _data(
        False, "Accepted; has no effect, since captions and sizes are read quickly."
    )
    strict_data: bool = _data(
        False, "Refuse to start when anything is found in the data, instead of one line per kind."
    )
    debug_dataset: bool = _data(False, "Print what would be trained on, then stop.")


@dataclass(frozen=True)
class CaptionKeys:
    """Options that are keys of a subset too: how a caption is made."""

    caption_extension: str | None = _caption(
        None, "Ending of caption files (default: .txt, then .caption)."
    )
    shuffle_caption: bool = _caption(False, "Shuffle the tags of a caption.")
    caption_separator: str = _caption(",", "What separates tags.")
    keep_tokens: int = _caption(
        0, "Leading tags that are never moved or dropped.", low=0, high=1_000_000
    )
    keep_tokens_separator: str = _caption("", "Mark after which tags may move, such as |||.")
    secondary_separator: str | None = _caption(None, "What joins tags that move together.")
    enable_wildcard: bool = _caption(False, "Choose among {a|b|c} and among the caption's lines.")
    caption_prefix: str | None = _caption(None, "Text before every caption.")
    caption_suffix: str | None = _caption(None, "Text after every caption.")
    caption_dropout_rate: float = _caption(0.0, "Probability of an empty caption.", low=0, high=1)
    caption_dropout_every_n_epochs: int = _caption(
        0, "Empty all captions in epochs divisible by this; 0 = off.", low=0, high=1_000_000
    )
    caption_tag_dropout_rate: float = _caption(
        0.0, "Probability that a tag is left out.", low=0, high=1
    )
    token_warmup_min: int = _caption(
        1, "Tags shown at the start of the tag warm-up.", low=0, high=1_000_000
    )
    token_warmup_step: float = _caption(
        0.0, "Steps (below 1: fraction of all) until all tags are shown; 0 = off.", low=0, high=1e9
    )


@dataclass(frozen=True)
class CaptionOptions(CaptionKeys):
    """Captions: defaults of the keys of the dataset file, and how they are encoded."""

    long_captions: str = _caption(
        "cut",
        "Captions over 512 tokens: cut off there, or encoded whole, as ComfyUI does with prompts.",
        choices=("cut", "whole"),
    )
    caption_variants: int = _caption(
        8, "Cached renderings of a caption when tags are shuffled or dropped.", low=1, high=4096
    )


@dataclass(frozen=True)
class BucketKeys:
    """Options that are keys of a dataset too: the sizes that images are brought to."""

    enable_bucket: bool = _image(False, "Sort images into buckets by their aspect ratio.")
    min_bucket_reso: int = _image(256, "Shortest side of a bucket in pixels.", low=16, high=32768)
    max_bucket_reso: int = _image(1024, "Longest side of a bucket in pixels.", low=16, high=32768)
    bucket_reso_steps: int = _image(
        64, "Steps of the sides in pixels, a multiple of 16.", low=16, high=4096, multiple=16
    )
    bucket_no_upscale: bool = _image(False, "Never enlarge an image to fill a bucket.")


@dataclass(frozen=True)
class PixelKeys:
    """Options that are keys of a subset too: how an image is read and augmented."""

    resize_interpolation: str | None = _image(
        None, "Filter for resizing (default: area to shrink, lanczos to enlarge).",
        choices=("lanczos", "box", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )  # fmt: skip
    exif_rotation: bool = _image(
        False, "Turn images as their EXIF data says; sd-scripts never does."
    )
    flip_aug: bool = _image(False, "Mirror half of the images.")
    color_aug: bool = _image(False, "Shift hue or gamma of some images; not with cached latents.")
    random_crop: bool = _image(False, "Crop at random places; not with cached latents.")


@dataclass(frozen=True)
class ImageOptions(PixelKeys, BucketKeys):
    """Buckets and augmentation."""

    face_crop_aug_range: str | None = _image(
        None, 'Crop around faces named in the file name, "smallest,largest" scale.',
        kind="range", low=0.01, high=1000,
    )  # fmt: skip


@dataclass(frozen=True)
class CacheOptions:
    """What is encoded once before training."""

    cache_latents: bool = _cache(False, "Encode all images once.")
    cache_latents_to_disk: bool = _cache(False, "The same, kept on disk for later runs.")
    vae_batch_size: int = _cache(1, "Images per VAE call while encoding.", low=1)
    cache_text_encoder_outputs: bool = _cache(
        False, "Encode all captions once; only the DiT is trained then."
    )
    cache_text_encoder_outputs_to_disk: bool = _cache(
        False, "The same, kept on disk for later runs."
    )
    text_encoder_batch_size: int | None = _cache(
        None, "Captions per text encoder call (default: the dataset's batch size).", low=1
    )
    skip_cache_check: bool = _cache(False, "Trust cache files without comparing their contents.")
    cache_dir: str | None = _cache(None, "Folder of the caches (default: next to the images).")
    highvram: bool = _cache(False, "Keep freed device memory between encoding batches.")


@dataclass(frozen=True)
class MaskOptions:
    """Loss on a part of the image."""

    masked_loss: bool = _mask(False, "Multiply the loss by masks from conditioning_data_dir.")
    alpha_mask: bool = _mask(False, "Use the alpha channel of the images as mask.")
    conditioning_data_dir: str | None = _mask(
        None, "Folder of mask images with the stems of the training images."
    )
