r"""Prompts → what the DiT's cross attention reads.

Each weighted part of a prompt is tokenised on its own and the ids are concatenated, as ComfyUI
does. Qwen3 knows no weights; a T5 token's weight multiplies its row of the LLM adapter's output.
Nothing is cut off: 512 is the smallest number of text rows, not the largest.

Weights are written as in ComfyUI: (words), (words:1.3), nesting, and \( \) as they are. A group in
parentheses weighs 1.1 times what surrounds it; with `:number` at its end it weighs exactly that
number. An item is a group when it begins with "(" and ends with ")", wherever parentheses are not
balanced; everything else is text. Source: `token_weights` and `parse_parentheses` of ComfyUI's
comfy/sd1_clip.py. Training captions are never read this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.models.dit_config import TEXT_ROWS

if TYPE_CHECKING:
    from anima_fast.models.llm_adapter import LLMAdapter
    from anima_fast.models.text_encoder import TextEncoder
    from anima_fast.models.tokenizers import TokenBatch, Tokenizers


EMPHASIS = 1.1
# Replace escaped parentheses while a prompt is taken apart.
OPEN, CLOSE = "\x00\x02", "\x00\x01"


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


def zero_keys(context: Tensor) -> int:
    """Zero text rows beyond a context [B, S, C]."""
    return max(0, TEXT_ROWS - context.shape[1])


def weighted_segments(prompt: str) -> list[tuple[str, float]]:
    """A prompt as texts with their weights, in order; at least one.

    Raises `UserError` for hundreds of nested parentheses.
    """
    text = prompt.replace(r"\)", CLOSE).replace(r"\(", OPEN)
    try:
        segments = _segments(text, 1.0)
    except RecursionError:
        raise UserError(
            f"the prompt {prompt[:40]!r} nests its parentheses too deeply: write (words:1.3)"
        ) from None
    found = [(text.replace(CLOSE, ")").replace(OPEN, "("), weight) for text, weight in segments]
    return found or [("", 1.0)]


def _segments(text: str, weight: float) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for item in _items(text):
        if len(item) < 2 or item[0] != "(" or item[-1] != ")":
            found.append((item, weight))
            continue
        inner, own = item[1:-1], weight * EMPHASIS
        colon = inner.rfind(":")
        number = _number(inner[colon + 1 :]) if colon > 0 else None
        if number is not None:
            inner, own = inner[:colon], number
        found += _segments(inner, own)
    return found


def _number(text: str) -> float | None:
    """A finite number; None for a colon that belongs to the text."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _items(text: str) -> list[str]:
    """Groups and the texts between them; parentheses inside a group stay in it."""
    items, current, depth = [], "", 0
    for character in text:
        if character == "(":
            if depth == 0 and current:
                items.append(current)
                current = ""
            depth += 1
        current += character
        if character == ")":
            depth -= 1
            if depth == 0:
                items.append(current)
                current = ""
    return [*items, current] if current else items
