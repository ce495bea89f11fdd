"""Which linear layers get an adapter.

In the DiT every linear layer inside a block, the patch embedding, the timestep embedding or the
final layer can be reached; by default only the ten of each block's attentions and MLP are taken.
Patterns are regular expressions that must match the whole dotted name, such as
`blocks.3.mlp.layer1`. An include pattern beats every exclude pattern.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from anima_fast.errors import UserError
from anima_fast.models.dit import Block, FinalLayer, PatchEmbed, TimestepEmbedding
from anima_fast.models.llm_adapter import AdapterBlock

DIT_CLASSES = (Block, PatchEmbed, TimestepEmbedding, FinalLayer)
DEFAULT_EXCLUDE = r".*(_modulation|_norm|_embedder|final_layer).*"
BLOCK = re.compile(r"blocks\.(\d+)\.")
Value = TypeVar("Value")
Default = TypeVar("Default")
TEXT_ENCODER_LAYERS = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


@dataclass(frozen=True)
class Target:
    """One layer: `model` is "dit" (LLM adapter included) or "text_encoder", `name` is dotted."""

    model: str
    name: str
    linear: nn.Linear


def find_targets(
    dit: nn.Module | None,
    llm_adapter: nn.Module | None,
    text_encoder: nn.Module | None,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    blocks: Collection[int] | None = None,
) -> list[Target]:
    """The layers to adapt, in the order of the modules.

    With `blocks`, those of other blocks of the DiT are left out. Raises `UserError` for a pattern
    that is not a regular expression, and for a block that the DiT does not have.
    """
    if dit is not None and blocks is not None:
        absent = sorted(set(blocks) - set(range(len(dit.blocks))))
        if absent:
            raise UserError(
                f"train_block_indices: there is no block {absent[0]}, this DiT has blocks 0 to "
                f"{len(dit.blocks) - 1}"
            )
    excluded = _compiled([DEFAULT_EXCLUDE, *exclude], "exclude_patterns")
    included = _compiled(include, "include_patterns")

    def chosen(name: str) -> bool:
        block = BLOCK.match(name)
        if blocks is not None and block is not None and int(block[1]) not in blocks:
            return False
        if any(pattern.fullmatch(name) for pattern in included):
            return True
        return not any(pattern.fullmatch(name) for pattern in excluded)

    found = []
    for model, classes, prefix in (
        (dit, DIT_CLASSES, ""),
        (llm_adapter, (AdapterBlock,), "llm_adapter."),
    ):
        if model is not None:
            found += [t for t in _linears(model, classes, prefix) if chosen(t.name)]
    if text_encoder is not None:
        found += [
            Target("text_encoder", f"text_encoder.{name}", module)
            for name, module in text_encoder.get_submodule("model").named_modules()
            if isinstance(module, nn.Linear) and TEXT_ENCODER_LAYERS.fullmatch(name)
        ]
    return found


def first_match(
    patterns: Mapping[str, Value], name: str, default: Default, option: str
) -> Value | Default:
    """The value of the first pattern that matches the whole name."""
    for pattern, value in patterns.items():
        if _compiled([pattern], option)[0].fullmatch(name):
            return value
    return default


def _linears(
    root: nn.Module, classes: tuple[type[nn.Module], ...], prefix: str
) -> Iterator[Target]:
    for outer, module in root.named_modules():
        if isinstance(module, classes):
            for inner, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    yield Target("dit", f"{prefix}{outer}.{inner}", layer)


def _compiled(patterns: Iterable[str], option: str) -> list[re.Pattern]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(
                f"{option}: {pattern!r} is not a regular expression ({error})"
            ) from None
    return compiled
