"""The models of the encoding phases: loaded on first use, freed at the end of their phase."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from anima_fast.data.cache import LatentEntry
from anima_fast.errors import UserError
from anima_fast.memory.free import free_memory
from anima_fast.models import checkpoint, llm_adapter, text_encoder, tokenizers, vae_checkpoint
from anima_fast.models.llm_adapter import LLMAdapter
from anima_fast.models.model_files import given
from anima_fast.models.text_encoder import TextEncoder
from anima_fast.models.tokenizers import Tokenizers
from anima_fast.models.vae import VAE
from anima_fast.options.data import ModelOptions
from anima_fast.options.sample import SampleOptions

# Pixels [3, H, W] fp32 in [-1, 1] and alpha [H, W] fp32 0..1, as `images.load_item` returns them.
Decoded = tuple[np.ndarray, np.ndarray | None]


class LatentEncoder:
    """The VAE while the phase needs it; `keep_cached` leaves freed memory with PyTorch."""

    def __init__(
        self,
        models: ModelOptions,
        device: torch.device,
        dtype: torch.dtype,
        *,
        keep_cached: bool = False,
    ) -> None:
        self._models, self._device, self._dtype = models, device, dtype
        self._keep_cached = keep_cached
        self._vaes: dict[torch.dtype, VAE] = {}

    def encode(self, decoded: Sequence[Decoded], flips: Sequence[bool]) -> list[LatentEntry | None]:
        """Entries of a batch of one bucket; None for an image whose latents are not finite.

        decoded: pixels [3, H, W] and alpha [H, W] or None of each. flips: encode mirrored too.
        """
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in decoded]))  # [B, 3, H, W]
        plain = self._latents(pixels)
        mirrored: list[Tensor | None] = [None] * len(decoded)
        chosen = [i for i, flip in enumerate(flips) if flip]
        if chosen:
            for i, latent in zip(chosen, self._latents(pixels[chosen].flip(-1)), strict=True):
                mirrored[i] = latent
        entries: list[LatentEntry | None] = []
        for i, (_, alpha) in enumerate(decoded):
            parts = [part for part in (plain[i], mirrored[i]) if part is not None]
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                entries.append(None)
                continue
            entries.append(LatentEntry(plain[i], mirrored[i], alpha_to_bytes(alpha)))
        return entries

    def free(self) -> None:
        """Drop the VAE and give its memory back."""
        self._vaes.clear()
        free_memory(self._device, keep_cached=self._keep_cached)

    def _latents(self, pixels: Tensor) -> list[Tensor]:
        """Latents of each image, fp32 on the CPU; half precision that overflows is done again."""
        latents = list(self._run(pixels, self._dtype))
        if self._dtype != torch.float32:
            for i, latent in enumerate(latents):
                if not torch.isfinite(latent).all():
                    latents[i] = self._run(pixels[i : i + 1], torch.float32)[0]
        return latents

    @torch.no_grad()
    def _run(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        vae = self._vae(dtype)
        rows = self._models.vae_chunk_size
        try:
            latents = vae.encode(pixels.to(self._device, dtype), chunk_rows=rows).float().cpu()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory while encoding {len(pixels)} images of "
                f"{pixels.shape[-1]}x{pixels.shape[-2]}: use --vae_batch_size 1 and a smaller "
                "--vae_chunk_size, such as 64"
            ) from error
        if not self._keep_cached and self._device.type == "cuda":
            torch.cuda.empty_cache()
        return latents

    def _vae(self, dtype: torch.dtype) -> VAE:
        if dtype not in self._vaes:
            self._vaes[dtype] = vae_checkpoint.load_vae(
                given(self._models.vae, "vae"), device=self._device, dtype=dtype
            )
        return self._vaes[dtype]


class TextModels:
    """Text encoder and LLM adapter, loaded on first use; `keep_cached` as `LatentEncoder`."""

    def __init__(
        self,
        models: ModelOptions,
        device: torch.device,
        dtype: torch.dtype,
        *,
        keep_cached: bool = False,
    ) -> None:
        self._models, self._device, self._dtype = models, device, dtype
        self._keep_cached = keep_cached
        self._encoder: TextEncoder | None = None
        self._adapter: LLMAdapter | None = None

    def encoder(self) -> TextEncoder:
        """The Qwen3 text encoder."""
        if self._encoder is None:
            self._encoder = text_encoder.load_text_encoder(
                given(self._models.qwen3, "qwen3"), device=self._device, dtype=self._dtype
            )
        return self._encoder

    def adapter(self) -> LLMAdapter:
        """The LLM adapter."""
        if self._adapter is None:
            self._adapter = llm_adapter.load_llm_adapter(
                adapter_path(self._models), device=self._device, dtype=self._dtype
            )
        return self._adapter

    def free(self) -> None:
        """Drop both and give their memory back."""
        self._encoder = self._adapter = None
        free_memory(self._device, keep_cached=self._keep_cached)


def adapter_path(options: ModelOptions) -> str:
    """The file that holds the LLM adapter. Raises `UserError` when it holds none."""
    path = options.llm_adapter_path or given(
        options.pretrained_model_name_or_path, "pretrained_model_name_or_path"
    )
    if not llm_adapter.has_llm_adapter(path):
        raise UserError(
            f"{path} holds no LLM adapter (llm_adapter.out_proj.weight): give the file that does "
            "with --llm_adapter_path"
        )
    return path


def source_width(options: ModelOptions) -> int:
    """Width of the Qwen3 states that the LLM adapter expects."""
    tensors = llm_adapter.adapter_tensors(checkpoint.Checkpoint.open(adapter_path(options)))
    assert tensors is not None
    return llm_adapter.AdapterConfig.from_shapes(tensors.shapes).source_width


def load_run_tokenizers(options: ModelOptions | SampleOptions, *, fetch: bool = True) -> Tokenizers:
    """The tokenizers that the options name; see `load_tokenizers`."""
    return tokenizers.load_tokenizers(
        options.qwen3,
        qwen3_tokenizer_path=options.qwen3_tokenizer_path,
        t5_tokenizer_path=options.t5_tokenizer_path,
        models_dir=options.models_dir,
        fetch=fetch,
    )


def alpha_to_bytes(alpha: np.ndarray | None) -> Tensor | None:
    """[H, W] 0..1, which came from bytes, as uint8 again."""
    if alpha is None:
        return None
    return torch.from_numpy(np.rint(alpha * 255).astype(np.uint8))
