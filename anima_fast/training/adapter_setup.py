"""The network of a LoRA run, from its options."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anima_fast.adapters.formats import named_tensors, read_lora
from anima_fast.adapters.lora import add_lora, merge_lora
from anima_fast.adapters.network import LoRANetwork
from anima_fast.adapters.targets import find_targets
from anima_fast.data.conditioning import Conditioning
from anima_fast.device import DTYPES
from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import LORA
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.model_files import check_lora_files
from anima_fast.training.kind import given

if TYPE_CHECKING:
    from anima_fast.models.dit_config import DitConfig
    from anima_fast.options.run import TrainOptions
    from anima_fast.options.training import NetworkOptions


def build_network(
    options: TrainOptions,
    dit: AnimaDiT,
    conditioning: Conditioning,
    *,
    seed: int,
    say: Callable[[str], None],
) -> LoRANetwork:
    """Merge `base_weights`, attach the LoRA, load `network_weights`."""
    merge_base_weights(options, dit, conditioning, say=say)
    start = options.network_weights
    layers = [name for name, module in dit.named_modules() if isinstance(module, nn.Linear)]
    network = add_lora(
        dit,
        rank=options.network_dim,
        alpha=options.network_alpha,
        dropout=options.network_dropout,
        llm_adapter=conditioning.adapter if options.trains_llm_adapter else None,
        text_encoder=conditioning.text_encoder if options.trains_text_encoder else None,
        train_dit=not options.network_train_text_encoder_only,
        unet_lr=options.learning_rate if options.unet_lr is None else options.unet_lr,
        text_encoder_lr=options.text_encoder_lr[0]
        if options.text_encoder_lr
        else options.learning_rate,
        dtype=DTYPES[options.mixed_precision]
        if options.full_bf16 or options.full_fp16
        else torch.float32,
        seed=seed,
        modules_from=read_lora(start)[0] if start and options.dim_from_weights else None,
        device="meta" if dit.x_embedder.proj[1].weight.is_meta else "cpu",
        **options.network_kwargs,
    )
    if start:
        ignored = network.load(start)
        say(f"started from {start}" + (f"; {len(ignored)} keys ignored" if ignored else ""))
    # A format that cannot hold this network must be refused now, not when training is over.
    deltas = {name: adapter.as_delta() for name, adapter in network.modules_by_name.items()}
    named_tensors(deltas, options.lora_format)
    if options.tlora_min_rank is not None:
        network.tlora = (options.tlora_min_rank, options.tlora_alpha)
    for text in unmatched_patterns(options.network_kwargs, {*layers, *network.modules_by_name}):
        say(text)
    modules = Counter(adapter.title for adapter in network.adapters)
    for kind, count in modules.items():
        say(f"{count} {kind} modules")
    if whole := sum(adapter.rank is None for adapter in network.adapters):
        say(f"{whole} of them have two whole factors: rank and alpha have no effect there")
    say(f"{sum(p.numel() for p in network.parameters()):,} parameters")
    return network


def check_files(options: NetworkOptions) -> None:
    """Refuse `network_weights` and `base_weights` that are missing or of another kind."""
    check_lora_files((options.network_weights, *options.base_weights))


def base_files(options: NetworkOptions) -> list[tuple[str, float]]:
    """The files of `base_weights` and their strengths."""
    multipliers = [*options.base_weights_multiplier, *[1.0] * len(options.base_weights)]
    return list(zip(options.base_weights, multipliers, strict=False))


def merge_base_weights(
    options: NetworkOptions,
    dit: AnimaDiT,
    conditioning: Conditioning,
    *,
    say: Callable[[str], None],
) -> None:
    """Merge the files of `base_weights` into the frozen models, each at its strength."""
    for path, multiplier in base_files(options):
        left = merge_lora(
            dit,
            path,
            multiplier,
            llm_adapter=conditioning.adapter,
            text_encoder=conditioning.text_encoder,
        )
        say(f"merged {path} into the model at {multiplier:g}")
        if left:
            say(
                f"{left} modules of {path} belong to the text path, whose outputs are cached: "
                "they are merged only without --cache_text_encoder_outputs"
            )


def check_network(options: TrainOptions, sizes: DitConfig) -> None:
    """Refuse a network that does not fit the DiT, before anything is encoded.

    The network is made on a DiT without values. Where the text path is trained too, its models
    would be needed, so only the choice of blocks is checked.
    """
    if options.dim_from_weights:
        check_kinds(options)
    with torch.device("meta"):
        dit = AnimaDiT(sizes)
    if options.trains_llm_adapter or options.trains_text_encoder:
        find_targets(dit, None, None, blocks=options.network_kwargs.get("blocks"))
        return
    no_text = Conditioning(torch.device("meta"), dit.dtype)
    build_network(options, dit, no_text, seed=0, say=lambda text: None)


def check_kinds(options: NetworkOptions) -> None:
    """Refuse options of plain LoRA where `dim_from_weights` loads another kind of network."""
    deltas = read_lora(given(options.network_weights))[0].values()
    for name, fits in (
        ("scale_weight_norms", lambda delta: delta.is_plain_lora),
        ("tlora_min_rank", lambda delta: delta.kind is LORA),
        ("network_dropout", lambda delta: delta.kind is LORA),
    ):
        other = next((delta.title for delta in deltas if not fits(delta)), None)
        if getattr(options, name) and other:
            raise UserError(
                f"--{name} is for LoRA, and --dim_from_weights takes a {other} from "
                f"{options.network_weights}: drop --{name}"
            )


def unmatched_patterns(arguments: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """A line for each pattern of `network_args` that matches none of the layers."""
    keys = {"exclude_patterns": "exclude_patterns", "include_patterns": "include_patterns"}
    keys |= {"reg_dims": "network_reg_dims", "reg_lrs": "network_reg_lrs"}
    for key, shown in keys.items():
        for pattern in arguments.get(key, ()):
            if not any(re.fullmatch(pattern, name) for name in names):
                yield (
                    f"network_args {shown}: {pattern} matches no layer; it must match a whole "
                    "name, such as blocks.3.mlp.layer1"
                )
