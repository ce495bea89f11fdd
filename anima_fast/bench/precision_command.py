"""`anima-fast parity precision`: the user's model and data in each arithmetic, as a table or JSON.

The data come the way a training run gets them: the first images of the dataset's first bucket, from
its caches or encoded now. What does not fit the tokens that are asked for is cut off around the
middle, as an emulated product is slow. On a card the kernels of a training run compute, elsewhere
(or with `--kernels eager`) the instruction is emulated on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.bench.emulated import (
    BF16,
    FP16_FULL,
    FP16_SHORT,
    HALF_MAX,
    Arithmetic,
    Sums,
    product,
)
from anima_fast.bench.precision import (
    SIGMAS,
    DitFile,
    EmulatedPass,
    Make,
    Row,
    Sample,
    compare,
    random_sample,
)
from anima_fast.bench.tables import table
from anima_fast.device import choose_device, uses_fused_blocks
from anima_fast.errors import UserError
from anima_fast.measure.probe import Probe, Product, choose_chain, probe
from anima_fast.memory.free import device_free, host_free
from anima_fast.models.dit_layers import PATCH
from anima_fast.progress import Bars

if TYPE_CHECKING:
    from anima_fast.options.run import TrainOptions

Say = Callable[[str], None]


def run_precision(options: TrainOptions, *, tokens: int, as_json: bool, say: Say) -> None:
    """Compare bf16, fp16 with float32 sums and fp16 with short sums on the DiT of `options`.

    Args:
        options: the model file; with a dataset also what encodes it.
        tokens: the largest count of image tokens a sample.
        as_json: print one JSON object instead of a table.
        say: prints.

    Raises:
        UserError: a file or a dataset that training would refuse, or too little memory.
    """
    model = DitFile(options.pretrained_model_name_or_path or "")
    if options.dataset_config or options.train_data_dir or options.in_json:
        sample = dataset_sample(options, tokens, (lambda _: None) if as_json else say)
    else:
        sample = random_sample(model.config, tokens)
    device = choose_device(options.device)
    make: Make = EmulatedPass
    multiply: Product = _emulated
    if kernels := uses_fused_blocks(options.kernels, device):
        # Not at the top: triton is not on every system that emulates.
        from anima_fast.bench.kernel_pass import KernelPass, kernel_product

        make, multiply = partial(KernelPass, device=device), kernel_product
    else:
        device = torch.device("cpu")
    chain, found = choose_chain(lambda chain: probe(multiply, chain, device))
    ways = ways_with(chain, bf16=device.type != "cuda" or has_bf16(device))
    check_memory(model, sample, len(ways) + 1, device)
    where = place(device) if kernels else ""
    if not as_json:
        say(about(model, sample, where))
        say(about_sums(chain, found))
    with Bars() as bars:
        rows = compare(model, sample, ways, bars.show, make)
    say(as_text(rows) if not as_json else as_object(rows, model, sample, chain, where))


def has_bf16(device: torch.device) -> bool:
    """Whether a card computes in bfloat16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def place(device: torch.device) -> str:
    """Where kernels run, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Triton's interpreter"


def _emulated(a: Tensor, b: Tensor, chain: int) -> Tensor:
    return product(a.float(), b.float(), Sums(chain))


def ways_with(chain: int, *, bf16: bool = True) -> tuple[Arithmetic, ...]:
    """What is compared where float16 sums of `chain` terms are good; without short ones for 0."""
    short = dataclasses.replace(FP16_SHORT, sums=Sums(chain))
    return (BF16,) * bf16 + (FP16_FULL,) + (short,) * bool(chain)


def check_memory(model: DitFile, sample: Sample, passes: int, device: torch.device) -> None:
    """Raise `UserError` where the block, the kept inputs and one backward do not fit in memory,
    of the card where that computes."""
    c, tokens, batch = model.config, sample.tokens, len(sample.latents)
    shapes = model.tensors.shapes
    weights = sum(math.prod(s) for name, s in shapes.items() if name.startswith("blocks.0."))
    head = sum(math.prod(s) for name, s in shapes.items() if not name.startswith("blocks."))
    kept = passes * (c.num_blocks + 1) * tokens * c.model_channels
    inner = tokens * (40 * c.model_channels + 8 * c.mlp_hidden)
    logits = 8 * c.num_heads * tokens * (tokens // batch + sample.context.shape[1])
    # The weights of a block in float32, as its arithmetic rounds them, and once on the way there; a
    # card has them in every arithmetic at the end of forward.
    needed = 4 * (3 * (head + weights) + kept + inner + logits)
    card = device.type == "cuda"
    free, what = (device_free(device), "GPU memory") if card else (host_free(), "memory")
    if free is not None and needed > free:
        raise UserError(
            f"this needs {needed / 2**30:.1f} GiB of {what} and {free / 2**30:.1f} GiB are free: "
            "close other programs or give fewer --tokens"
        )


@torch.no_grad()
def dataset_sample(options: TrainOptions, tokens: int, say: Say) -> Sample:
    """The first images of the first bucket and their captions, as the trainer encodes them.

    Raises `UserError` for what training would refuse.
    """
    from anima_fast.data.batches import Batches
    from anima_fast.data.conditioning import load_conditioning
    from anima_fast.data.encode import encode_dataset
    from anima_fast.data.plan import build_plan
    from anima_fast.device import DTYPES
    from anima_fast.models.model_files import check_model_files
    from anima_fast.training.arithmetic import predicted
    from anima_fast.training.kind import vae_dtype

    check_model_files(
        options.pretrained_model_name_or_path, options.qwen3, options.vae, options.llm_adapter_path,
        dit_option="dit",
    )  # fmt: skip
    options = dataclasses.replace(options, cache_latents=True, cache_text_encoder_outputs=True)
    plan = build_plan(options)
    first = plan.items[0]
    same = [i for i in plan.items if (i.dataset, i.bucket) == (first.dataset, first.bucket)]
    items = [dataclasses.replace(i, index=n) for n, i in enumerate(same[: len(SIGMAS)])]
    plan = dataclasses.replace(plan, items=items, validation_items=[])
    device = torch.device("cpu")
    word = predicted(options, device).mixed_precision
    dtype, vae_type = DTYPES[word], vae_dtype(options, word)
    encoded = encode_dataset(plan, options, vae_dtype=vae_type, text_dtype=dtype, say=say)
    # One image stands for all noise levels where a bucket has no second.
    indices = [n % len(items) for n in range(len(SIGMAS))]
    batch = Batches(plan, encoded, options, seed=0).load(indices, epoch=1, step=0)
    assert batch.latents is not None
    conditioning = load_conditioning(
        options, encoded.text_mode, device=device, dtype=dtype, models_dtype=dtype
    )
    context, zero_rows = conditioning(batch.text)
    counts = [zero_rows] * len(indices) if isinstance(zero_rows, int) else list(zero_rows)
    names = ", ".join(dict.fromkeys(item.path.name for item in items))
    latents = cut(batch.latents, tokens)
    whole = "" if latents.shape == batch.latents.shape else "the middle of "
    return Sample.of(latents, context, counts, f"{whole}{names}")


def cut(latents: Tensor, tokens: int) -> Tensor:
    """The middle of latents [B, C, h, w], of the same proportions and at most `tokens` tokens."""
    height, width = (size // PATCH for size in latents.shape[-2:])
    share = min(1.0, math.sqrt(tokens / (height * width)))
    h, w = (max(1, int(share * side)) for side in (height, width))
    top, left = PATCH * ((height - h) // 2), PATCH * ((width - w) // 2)
    return latents[..., top : top + PATCH * h, left : left + PATCH * w].contiguous()


def about(model: DitFile, sample: Sample, where: str) -> str:
    """What is compared, and where kernels compute it; "": it is emulated."""
    c, batch = model.config, len(sample.latents)
    levels = " and ".join(f"{sigma:g}" for sigma in sample.sigma.tolist())
    return (
        f"{model.tensors.name}: {c.num_blocks} blocks of {c.model_channels}, against float32\n"
        f"{sample.about}: {batch} samples of {sample.tokens // batch} tokens, noise {levels}\n"
        + (f"by the kernels on {where}" if where else "emulated on the CPU: no card computes here")
    )


def about_sums(chain: int, found: Probe) -> str:
    """What the probe of float16 sums says."""
    figures = f"error {found.error:.1e}, bf16 {found.bf16_error:.1e}, gain {found.gain:+.0e}"
    if not chain:
        return f"float16 sums are too inexact here, so that sums are float32 ({figures})"
    return f"float16 sums of {chain} terms ({figures})"


def as_text(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        (
            row.precision, f"{row.cosine:.8f}", f"{row.one_minus_cosine:.1e}",
            f"{row.velocity:.1e}", f"{row.worst_cosine:.8f}", row.worst_layer,
        )
        for row in rows
    ]  # fmt: skip
    header = ("precision", "cosine", "1 - cosine", "velocity", "worst", "layer")
    text = table(header, lines)
    for row in rows:
        if not math.isfinite(row.cosine + row.velocity):
            text += f"\n{row.precision}: not finite on this model, use bf16"
        if row.saturated:
            values = "a value is" if row.saturated == 1 else f"{row.saturated} values are"
            text += f"\n{row.precision}: {values} beyond {HALF_MAX:.0f}, use bf16 on this model"
    return text


def as_object(rows: Sequence[Row], model: DitFile, sample: Sample, chain: int, where: str) -> str:
    """The JSON; null where a number is not finite, or nobody counts."""
    found = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in map(dataclasses.asdict, rows)
    ]
    facts = {
        "rows": found,
        "reference": "float32",
        "emulated": not where,
        "sums": chain,
        "dit": model.tensors.name,
        "input": sample.about,
        "tokens": sample.tokens,
        "sigma": sample.sigma.tolist(),
    }
    return json.dumps(facts, indent=1, ensure_ascii=False)
