"""The prompts of previews and their encoded texts, made before the DiT is loaded.

Texts are encoded once, with the models that the captions need anyway; the trained part of the text
path runs again at each preview.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.data.conditioning import Conditioning
from anima_fast.data.encode_models import EncodingModels, load_run_tokenizers
from anima_fast.errors import UserError
from anima_fast.sampling.prompts import Prompt, collect_prompts, say_ignored, unescape
from anima_fast.sampling.texts import PromptTokens, adapt, encode_states, tokenize_prompt
from anima_fast.training.checks import given
from anima_fast.training.kind import Say

if TYPE_CHECKING:
    from anima_fast.models.tokenizers import Tokenizers
    from anima_fast.options.output import PreviewOptions
    from anima_fast.options.run import FinetuneOptions, TrainOptions


@dataclass(frozen=True)
class PreviewText:
    """An encoded text on the CPU: its context [1, S, C], or where the adapter is trained its states
    [1, N, C]."""

    tokens: PromptTokens
    states: Tensor | None = None
    context: Tensor | None = None


@dataclass(frozen=True)
class PreviewPrompts:
    """The prompts of a run.

    Attributes:
        prompts: as read at the start.
        texts: the encoded texts by text; empty if `live`.
        live: the whole text path runs at each preview.
    """

    prompts: list[Prompt]
    texts: Mapping[str, PreviewText] = field(default_factory=dict)
    live: bool = False

    def current(self, options: PreviewOptions, say: Say) -> list[Prompt]:
        """The prompts as their file has them now; says which cannot be used."""
        try:
            prompts = collect_prompts(options)
        except UserError as error:
            say(f"the prompts of the start are used: {error}")
            prompts = self.prompts
        if self.live:
            return prompts
        known = [p for p in prompts if all(unescape(text) in self.texts for text in p.texts)]
        if len(known) < len(prompts):
            say(f"{len(prompts) - len(known)} prompts are new: they are shown when the run resumes")
        return known

    @torch.no_grad()
    def context(self, parts: Conditioning, text: str) -> Tensor:
        """What the DiT reads for a text: [1, S, C] on the device."""
        text = unescape(text)
        if self.live:
            tokens = tokenize_prompt(given(parts.tokenizers), text)
            states = encode_states(tokens, given(parts.text_encoder), parts.device)
            return adapt(tokens, states.to(parts.dtype), given(parts.adapter))
        found = self.texts[text]
        if found.context is not None:
            return found.context.to(parts.device, parts.dtype)
        states = given(found.states).to(parts.device, parts.dtype)
        return adapt(found.tokens, states, given(parts.adapter))


def prepare_prompts(
    options: TrainOptions | FinetuneOptions,
    text_mode: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    say: Say,
) -> PreviewPrompts | None:
    """Read the prompts and encode their texts; None when no previews are asked for.

    Args:
        options: of the run.
        text_mode: of `load_conditioning`: context, states or live.
        device, dtype: of the text models.
        say: gets notices.

    Raises:
        UserError: prompts that cannot be read.
    """
    prompts = collect_prompts(options)
    if not prompts:
        return None
    say_ignored(prompts, say)
    if text_mode == "live":
        return PreviewPrompts(prompts, live=True)
    say("encoding the prompts of previews")
    texts = [unescape(text) for prompt in prompts for text in prompt.texts]
    models = EncodingModels(options, device, dtype)
    encoded = encode_texts(
        list(dict.fromkeys(texts)), models, load_run_tokenizers(options), text_mode, device
    )
    return PreviewPrompts(prompts, encoded)


@torch.no_grad()
def encode_texts(
    texts: list[str],
    models: EncodingModels,
    tokenizers: Tokenizers,
    text_mode: str,
    device: torch.device,
) -> dict[str, PreviewText]:
    """Run the frozen part of the text path over each text."""
    found = {}
    for text in texts:
        tokens = tokenize_prompt(tokenizers, text)
        states = encode_states(tokens, models.encoder, device)
        if text_mode == "states":
            found[text] = PreviewText(tokens, states=states.cpu())
        else:
            found[text] = PreviewText(tokens, context=adapt(tokens, states, models.adapter).cpu())
    models.free()
    return found
