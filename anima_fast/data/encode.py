"""Encode once: images to latents, captions to text context, before the DiT is loaded.

`encode_dataset` reports captions that are too long and then runs two phases one after the other,
each with its own models, so that the VAE and the text encoder are never in memory together and both
are gone when training starts. Both phases leave a cache on disk (see `cache.py`), whichever flag
turned them on; with the `_to_disk` flags entries are also read from it for every batch instead of
staying in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from anima_fast.data.cache import LatentEntry, Stored, TextEntry
from anima_fast.data.cache_folders import CacheFolders
from anima_fast.data.caption_tokens import CaptionTokens, count_tokens, renderings
from anima_fast.data.dataset_config import caches_latents, caches_text
from anima_fast.data.encode_latents import LatentPhase
from anima_fast.data.encode_models import EncodingModels, load_run_tokenizers
from anima_fast.data.encode_text import TextPhase
from anima_fast.data.items import DatasetPlan
from anima_fast.data.lowres import LowRes
from anima_fast.options.data import CacheOptions
from anima_fast.options.run import AnyRun

Texts = list[tuple[Stored[TextEntry], ...]]


@dataclass
class EncodedDataset:
    """Cache entries of a run by item index.

    `image_mode` is "cached" or "live" (batches carry pixels), `text_mode` "context", "states"
    (the LLM adapter is trained) or "live" (batches carry captions). In a live mode the entries
    are empty. `small_latents` holds those of smaller pictures, `texts` the renderings of each
    caption, `empty_text` the encoding of "", `tokens` their lengths in tokens.
    """

    image_mode: str
    text_mode: str
    device: torch.device
    tokens: CaptionTokens
    latents: list[Stored[LatentEntry]] = field(default_factory=list)
    validation_latents: list[Stored[LatentEntry]] = field(default_factory=list)
    small_latents: dict[int, Stored[LatentEntry]] = field(default_factory=dict)
    texts: Texts = field(default_factory=list)
    validation_texts: Texts = field(default_factory=list)
    empty_text: Stored[TextEntry] | None = None


def encode_dataset(
    plan: DatasetPlan,
    options: AnyRun,
    *,
    device: str | torch.device = "cpu",
    vae_dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype = torch.bfloat16,
    lowres: LowRes | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> EncodedDataset:
    """Fill the caches that the options ask for and open them; no model stays in memory.

    Args:
        device: where the VAE, then the text encoder and the LLM adapter run.
        vae_dtype: of the VAE; latents are stored in fp32 whatever it is.
        text_dtype: of encoder and adapter, and of the stored encodings.
        lowres: which smaller pictures are encoded too.
        say: gets each notice and the progress where no bar can be drawn.
    Raises:
        UserError: unreadable images or models, encodings that are not finite (with the image or
            caption and the stage), options that exclude caching, no space or permission to write.
    """
    device = torch.device(device)
    items = [*plan.items, *plan.validation_items]
    count = len(plan.items)
    tokenizers, texts = load_run_tokenizers(options), renderings(items, options)
    tokens = count_tokens(items, texts, tokenizers, options)
    encoded = EncodedDataset(choose_image_mode(options), choose_text_mode(options), device, tokens)

    for notice in tokens.notices():
        say(notice)
    paths = [item.path for item in items]
    folders = CacheFolders(options.cache_dir, options.output_dir, paths, say)
    if encoded.image_mode == "cached":
        models = EncodingModels(options, device, vae_dtype)
        keep = not options.cache_latents_to_disk
        phase = LatentPhase(options, folders, models, keep, say)
        latents = phase.run(items)
        encoded.latents, encoded.validation_latents = latents[:count], latents[count:]
        if lowres is not None:
            small = [s for item in plan.items if (s := lowres.small_item(item)) is not None]
            # Files of sd-scripts hold the full size.
            found = zip(small, replace(phase, legacy=False).run(small), strict=True)
            encoded.small_latents = {item.index: entry for item, entry in found}
    if encoded.text_mode != "live":
        models = EncodingModels(options, device, text_dtype)
        keep = not options.cache_text_encoder_outputs_to_disk
        largest = max(item.dataset.batch_size for item in items)
        size = options.text_encoder_batch_size or largest
        entries, encoded.empty_text = TextPhase(
            options, folders, models, keep, say, tokenizers, tokens, encoded.text_mode, size
        ).run(items, texts)
        encoded.texts, encoded.validation_texts = entries[:count], entries[count:]
    return encoded


def choose_image_mode(options: CacheOptions) -> str:
    """ "cached" with either latent cache flag, else "live"."""
    return "cached" if caches_latents(options) else "live"


def choose_text_mode(options: AnyRun) -> str:
    """ "live" without a text cache, else "states" when the LLM adapter is trained, or "context"."""
    if not caches_text(options):
        return "live"
    return "states" if options.trains_llm_adapter else "context"
