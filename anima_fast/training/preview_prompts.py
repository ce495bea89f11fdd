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
from anima_fast.training.kind import AnyOptions, Say, given

if TYPE_CHECKING:
    from anima_fast.options.output import PreviewOptions


@dataclass(frozen=True)
class PreviewPrompts:
    """The prompts of a run.

    Attributes:
        prompts: as read at the start.
        text_mode: context, states (the adapter runs at each preview) or live (so does Qwen3).
        texts: tokens of each text, and on the CPU its context [1, S, C] or its states [1, N, C];
            empty when live.
    """

    prompts: list[Prompt]
    text_mode: str
    texts: Mapping[str, tuple[PromptTokens, Tensor]] = field(default_factory=dict)

    def current(self, options: PreviewOptions, say: Say) -> list[Prompt]:
        """The prompts as their file has them now; says which cannot be used."""
        try:
            prompts = collect_prompts(options)
        except UserError as error:
            say(f"the prompts of the start are used: {error}")
            prompts = self.prompts
        if self.text_mode == "live":
            return prompts
        known = [p for p in prompts if all(unescape(text) in self.texts for text in p.texts)]
        if len(known) < len(prompts):
            say(f"{len(prompts) - len(known)} prompts are new: they are shown when the run resumes")
        return known

    @torch.no_grad()
    def context(self, parts: Conditioning, text: str) -> Tensor:
        """What the DiT reads for a text: [1, S, C] on the device."""
        text = unescape(text)
        if self.text_mode == "live":
            tokens = tokenize_prompt(given(parts.tokenizers), text)
            values = encode_states(tokens, given(parts.text_encoder), parts.device)
        else:
            tokens, values = self.texts[text]
        values = values.to(parts.device)
        if self.text_mode != "context":
            values = adapt(tokens, values, given(parts.adapter))
        return values.to(parts.dtype)


@torch.no_grad()
def prepare_prompts(
    options: AnyOptions, text_mode: str, *, device: torch.device, dtype: torch.dtype, say: Say
) -> PreviewPrompts | None:
    """Read the prompts and encode their texts; None when no previews are asked for.

    `text_mode` is that of `load_conditioning`; device and dtype are for the text models. Raises
    `UserError` for prompts that cannot be read.
    """
    prompts = collect_prompts(options)
    if not prompts:
        return None
    say_ignored(prompts, say)
    if text_mode == "live":
        return PreviewPrompts(prompts, text_mode)
    say("encoding the prompts of previews")
    models = EncodingModels(options, device, dtype)
    tokenizers = load_run_tokenizers(options)
    found = {}
    for text in dict.fromkeys(unescape(text) for prompt in prompts for text in prompt.texts):
        tokens = tokenize_prompt(tokenizers, text)
        states = encode_states(tokens, models.encoder, device)
        values = states if text_mode == "states" else adapt(tokens, states, models.adapter)
        found[text] = tokens, values.cpu()
    models.free()
    return PreviewPrompts(prompts, text_mode, found)
