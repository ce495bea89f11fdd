"""The models of the encoding phases: loaded on first use, freed at the end of their phase."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from anima_fast.errors import UserError
from anima_fast.memory.free import free_memory
from anima_fast.models import checkpoint, llm_adapter, text_encoder, tokenizers, vae_checkpoint
from anima_fast.models.llm_adapter import LLMAdapter
from anima_fast.models.model_files import given
from anima_fast.models.text_encoder import TextEncoder
from anima_fast.models.tokenizers import Tokenizers
from anima_fast.models.vae import VAE
from anima_fast.options.data import ModelOptions
from anima_fast.options.run import AnyRun
from anima_fast.options.sample import SampleOptions


@dataclass
class EncodingModels:
    """VAE, text encoder and LLM adapter in `dtype`; with `highvram` PyTorch keeps freed memory."""

    options: AnyRun
    device: torch.device
    dtype: torch.dtype
    _vaes: dict[torch.dtype, VAE] = field(default_factory=dict)

    def vae(self, dtype: torch.dtype) -> VAE:
        """The VAE, in a dtype of its own: what overflows is encoded again in another."""
        if dtype not in self._vaes:
            path = given(self.options.vae, "vae")
            self._vaes[dtype] = vae_checkpoint.load_vae(path, device=self.device, dtype=dtype)
        return self._vaes[dtype]

    @cached_property
    def encoder(self) -> TextEncoder:
        """The Qwen3 text encoder."""
        path = given(self.options.qwen3, "qwen3")
        return text_encoder.load_text_encoder(path, device=self.device, dtype=self.dtype)

    @cached_property
    def adapter(self) -> LLMAdapter:
        """The LLM adapter."""
        path = adapter_path(self.options)
        return llm_adapter.load_llm_adapter(path, device=self.device, dtype=self.dtype)

    def free(self) -> None:
        """Drop all of them and give their memory back."""
        self._vaes.clear()
        for name in ("encoder", "adapter"):
            vars(self).pop(name, None)
        free_memory(self.device, keep_cached=self.options.highvram)


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
