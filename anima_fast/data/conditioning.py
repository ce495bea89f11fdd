"""Text inputs of a batch → what the DiT's cross attention reads.

Three ways, by what is trained and cached:

* `context`: the cache holds the LLM adapter's output; nothing but a copy to the device is left.
* `states`: the adapter is trained: the cache holds Qwen3 states and T5 ids, and it runs each step.
* `live`: captions are not cached (or Qwen3 is trained), so the full text path runs each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anima_fast.data.batches import CaptionInputs, ContextInputs, TextInputs, zero_key_counts
from anima_fast.data.encode_models import EncodingModels, load_run_tokenizers
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.llm_adapter import LLMAdapter
from anima_fast.models.text_encoder import TextEncoder
from anima_fast.models.tokenizers import Tokenizers
from anima_fast.options.run import AnyRun


@dataclass
class Conditioning:
    """The part of the text path that stays on the device during training.

    `dtype` is that of the context; the models may compute in another one.
    """

    device: torch.device
    dtype: torch.dtype
    adapter: LLMAdapter | None = None
    text_encoder: TextEncoder | None = None
    tokenizers: Tokenizers | None = None
    token_limits: tuple[int, int] = (TEXT_ROWS, TEXT_ROWS)

    def __call__(self, text: TextInputs) -> tuple[Tensor, int | tuple[int, ...]]:
        """Context [B, S, C] in the compute dtype and the zero rows beyond it."""
        if isinstance(text, ContextInputs):
            return text.context.to(self.device, self.dtype, non_blocking=True), text.zero_keys
        if isinstance(text, CaptionInputs):
            assert self.tokenizers is not None and self.text_encoder is not None
            tokens = self.tokenizers.encode(text.captions, *self.token_limits)
            source_mask = tokens.qwen_mask.to(self.device)
            states = self.text_encoder(tokens.qwen_ids.to(self.device), source_mask)
            ids, mask = tokens.t5_ids, tokens.t5_mask
        else:
            source_mask = text.source_mask.to(self.device)
            states = text.source_states.to(self.device, non_blocking=True)
            ids, mask = text.t5_ids, text.t5_mask
        assert self.adapter is not None
        counts = mask.sum(1).tolist()
        ids, mask = ids.to(self.device), mask.to(self.device)
        # The adapter takes states of any type.
        context = self.adapter(ids, mask, states, source_mask)
        return context.to(self.dtype), zero_key_counts(counts)


def load_conditioning(
    options: AnyRun,
    text_mode: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    models_dtype: torch.dtype,
) -> Conditioning:
    """Load what `text_mode` ("context", "states" or "live") needs each step.

    dtype: of the context, which the DiT reads. models_dtype: of the encoder and the adapter.
    """
    conditioning = Conditioning(device, dtype, token_limits=options.token_limits)
    models = EncodingModels(options, device, models_dtype)
    if text_mode != "context":
        conditioning.adapter = models.adapter
    if text_mode == "live":
        conditioning.tokenizers = load_run_tokenizers(options)
        conditioning.text_encoder = models.encoder
    return conditioning
