"""Prompts → what the DiT's cross attention reads.

Each weighted part of a prompt is tokenised by itself and the ids are put together, as ComfyUI does.
Qwen3 knows no weights; a T5 token's weight multiplies its row of the LLM adapter's output.
Nothing is cut off: 512 is the least number of text rows, not the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.sampling.prompt_weights import weighted_segments

if TYPE_CHECKING:
    from anima_fast.models.llm_adapter import LLMAdapter
    from anima_fast.models.text_encoder import TextEncoder
    from anima_fast.models.tokenizers import TokenBatch, Tokenizers


@dataclass(frozen=True)
class PromptTokens:
    """One prompt: ids and masks [1, N], and the weight of each T5 token [S] float32."""

    ids: TokenBatch
    weights: Tensor


def tokenize_prompt(tokenizers: Tokenizers, text: str, *, weighted: bool = True) -> PromptTokens:
    """Ids of a prompt and the weights in it; parentheses are plain text without `weighted`."""
    segments = weighted_segments(text) if weighted else [(text, 1.0)]
    ids, counts = tokenizers.encode_segments([segment for segment, _ in segments])
    weights = [w for (_, w), n in zip(segments, counts, strict=True) for _ in range(n)]
    # The end token weighs 1.
    return PromptTokens(ids, torch.tensor([*weights, 1.0]))


def encode_states(tokens: PromptTokens, encoder: TextEncoder, device: torch.device) -> Tensor:
    """Qwen3 states [1, N, C] of a prompt, on the device."""
    return encoder(tokens.ids.qwen_ids.to(device), tokens.ids.qwen_mask.to(device))


def adapt(tokens: PromptTokens, states: Tensor, adapter: LLMAdapter) -> Tensor:
    """Context [1, S, C] of a prompt from its states, which are on the adapter's device."""
    ids, device = tokens.ids, states.device
    context = adapter(
        ids.t5_ids.to(device), ids.t5_mask.to(device), states, ids.qwen_mask.to(device)
    )
    if bool((tokens.weights == 1).all()):
        return context
    return context * tokens.weights.to(context)[None, :, None]


def zero_keys(context: Tensor) -> int:
    """Zero text rows beyond a context [B, S, C]."""
    return max(0, TEXT_ROWS - context.shape[1])


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    tokenizers: Tokenizers,
    encoder: TextEncoder,
    adapter: LLMAdapter,
    *,
    device: torch.device,
    weighted: bool = True,
) -> list[Tensor]:
    """Context [1, S, C] of each prompt, on the device; S differs."""
    contexts = []
    for prompt in prompts:
        # One prompt at a time has no padding, so every row is a real one.
        tokens = tokenize_prompt(tokenizers, prompt, weighted=weighted)
        contexts.append(adapt(tokens, encode_states(tokens, encoder, device), adapter))
    return contexts
