"""Text inputs of a batch → what the DiT's cross attention reads.

Three ways, by what is trained and cached:

* `context`: the cache holds the LLM adapter's output; nothing but a copy to the device is left.
* `states`: the adapter is trained: the cache holds Qwen3 states and T5 ids, and it runs each step.
* `live`: captions are not cached (or Qwen3 is trained), so the whole text path runs each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.data.batches import TextInputs, zero_key_counts
from anima_fast.models.llm_adapter import load_llm_adapter

if TYPE_CHECKING:
    from anima_fast.models.llm_adapter import LLMAdapter
    from anima_fast.models.text_encoder import TextEncoder
    from anima_fast.models.tokenizers import Tokenizers
    from anima_fast.options.run import TrainOptions


@dataclass
class Conditioning:
    """The part of the text path that stays on the device during training."""

    device: torch.device
    dtype: torch.dtype
    adapter: LLMAdapter | None = None
    text_encoder: TextEncoder | None = None
    tokenizers: Tokenizers | None = None
    token_limits: tuple[int, int] = (512, 512)

    def __call__(self, text: TextInputs) -> tuple[Tensor, int | tuple[int, ...]]:
        """Context [B, S, C] in the compute dtype and the zero rows beyond it."""
        if text.context is not None:
            return text.context.to(self.device, self.dtype, non_blocking=True), text.zero_keys
        if text.captions is not None:
            tokens = self.tokenizers.encode(text.captions, *self.token_limits)
            counts = tokens.t5_mask.sum(1).tolist()
            qwen_ids, source_mask, t5_ids, t5_mask = (
                t.to(self.device)
                for t in (tokens.qwen_ids, tokens.qwen_mask, tokens.t5_ids, tokens.t5_mask)
            )
            states = self.text_encoder(qwen_ids, source_mask)
        else:
            counts = text.t5_mask.sum(1).tolist()
            states = text.source_states.to(self.device, self.dtype, non_blocking=True)
            source_mask = text.source_mask.to(self.device)
            t5_ids, t5_mask = text.t5_ids.to(self.device), text.t5_mask.to(self.device)
        context = self.adapter(t5_ids, t5_mask, states.to(self.dtype), source_mask)
        return context, zero_key_counts(counts)


def load_conditioning(
    options: TrainOptions, text_mode: str, *, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """Load what `text_mode` ("context", "states" or "live") needs each step."""
    conditioning = Conditioning(device, dtype, token_limits=options.token_limits)
    if text_mode == "context":
        return conditioning
    source = options.llm_adapter_path or options.pretrained_model_name_or_path
    conditioning.adapter = load_llm_adapter(source, device=device, dtype=dtype)
    if text_mode == "live":
        from anima_fast.models.text_encoder import load_text_encoder
        from anima_fast.models.tokenizers import load_tokenizers

        conditioning.tokenizers = load_tokenizers(
            options.qwen3,
            qwen3_tokenizer_path=options.qwen3_tokenizer_path,
            t5_tokenizer_path=options.t5_tokenizer_path,
            models_dir=options.models_dir,
        )
        conditioning.text_encoder = load_text_encoder(options.qwen3, device=device, dtype=dtype)
    return conditioning
