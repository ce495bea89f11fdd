"""The fused block and a training run in numbers that `anima-fast parity` compares with stored ones.

`block_checks` holds a DiT of two fused blocks, its kernels interpreted or on the card, against the
eager one in float64: the output and every gradient, under the rule of the parity table.
`loss_rows` are losses: twenty steps of the fused and of the eager DiT towards a teacher, and a
whole run of the trainer on a tiny stack, in which everything that is drawn at random has a part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anima_fast.adapters.lora import LoRANetwork, add_lora
from anima_fast.bench.choice import Choice, name_of
from anima_fast.bench.errors import digits, rows, source_of
from anima_fast.bench.parity import Check, floor, full_precision, relative_error
from anima_fast.bench.run_file import Measurement
from anima_fast.demo.tiny_stack import build_stack, random_weights
from anima_fast.device import one_thread
from anima_fast.kernels import dispatch
from anima_fast.kernels.sums import CHAINS, use_sums
from anima_fast.models import fuse
from anima_fast.models.block import BlockSettings
from anima_fast.models.dit import AnimaDiT, DitConfig, load_dit

CONFIG = DitConfig(
    model_channels=64, num_blocks=2, num_heads=2, head_dim=32, context_dim=24,
    adaln_rank=8, mlp_hidden=128,
)  # fmt: skip
# The curve is twenty steps long, and a block takes seconds.
ONE = dataclasses.replace(CONFIG, num_blocks=1)
# So many rows that an adapter's gradient has a thousand elements.
RANK = 16
# dtype, what is computed again, and who makes the products: "short" with short float16 sums.
Way: TypeAlias = tuple[torch.dtype, str, str]
SHORT: Way = (torch.float16, "none", "short")
WAYS: tuple[Way, ...] = (
    (torch.float64, "none", "triton"),
    (torch.float32, "none", "triton"),
    (torch.float16, "none", "triton"),
    SHORT,
    (torch.bfloat16, "none", "triton"),
    (torch.bfloat16, "none", "cublas"),
    (torch.bfloat16, "mlp", "triton"),
    (torch.bfloat16, "block", "triton"),
)
QUICK = (WAYS[0], WAYS[5])
# What a loss is multiplied with where gradients are float16, as in training.
LOSS_SCALE = 2.0**10
STEPS = 20
# What losses of the fused and of the eager curve may differ by, as a share.
CURVE_LIMIT = 2e-3

Device: TypeAlias = torch.device | str


def _dit(
    dtype: torch.dtype, device: Device, attn_mode: str = "torch", config: DitConfig = CONFIG
) -> AnimaDiT:
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in AnimaDiT(config).state_dict().items()}
    return load_dit(random_weights(shapes, 1), dtype=dtype, attn_mode=attn_mode).to(device)


def _network(dit: AnimaDiT, device: Device) -> LoRANetwork:
    """Adapters on every layer, those of AdaLN too, whose second factor is not zero."""
    network = add_lora(dit, rank=RANK, alpha=RANK / 2, seed=1, include_patterns=[".*adaln.*"])
    generator = torch.Generator().manual_seed(5)
    for adapter in network.adapters:
        adapter.up.data.copy_(torch.randn(adapter.up.shape, generator=generator) * 0.1)
    return network.to(device)


def _inputs(dtype: torch.dtype, device: Device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        # Representable in every dtype: all compute the same function.
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype).to(device)

    return {
        "latents": draw(2, CONFIG.in_channels, 8, 10),
        "sigma": torch.tensor([0.25, 0.875], dtype=wide, device=device),
        "context": draw(2, 5, CONFIG.context_dim),
        "zero_keys": [507, 20],
    }


@contextlib.contextmanager
def _products(kind: str) -> Iterator[None]:
    """Inside the block fused blocks take their products from the kernel or from the library."""
    before: Any = fuse.BlockSettings
    products = "triton" if kind == "short" else kind
    setattr(fuse, "BlockSettings", functools.partial(BlockSettings, products=products))  # noqa: B010
    try:
        with use_sums(max(CHAINS) if kind == "short" else 0):
            yield
    finally:
        setattr(fuse, "BlockSettings", before)  # noqa: B010


def _step(dtype: torch.dtype, device: Device, policy: str | None, kind: str) -> dict[str, Tensor]:
    """The output and the gradients of one step, by name; `policy` None is the eager DiT."""
    dit = _dit(dtype, device, "torch" if policy is None else "triton")
    network = _network(dit, device)
    if policy is not None:
        fuse.fuse_blocks(dit, policy)
    mode = "auto" if policy is None else "triton"
    scale = LOSS_SCALE if kind == "short" else 1.0
    with dispatch.use(mode), _products(kind), full_precision():
        out = dit(**_inputs(dtype, device))
        wide = out.to(torch.promote_types(dtype, torch.float32))
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        (scale * (wide - target.to(wide)).square().mean()).backward()
    values = {"out": out.detach()}
    for name, adapter in network.modules_by_name.items():
        for factor in ("down", "up"):
            values[f"{name}.{factor}"] = getattr(adapter, factor).grad / scale
    return values


def block_checks(
    device: Device = "cpu", ways: Sequence[Way] = WAYS, dtypes: Sequence[str] = ()
) -> Iterator[Check]:
    """The fused blocks against the eager ones in float64.

    With short sums they may err half as much as the eager ones in bfloat16.
    """
    exact = _step(torch.float64, device, None, "auto")
    eager: dict[torch.dtype, dict[str, float]] = {}
    for dtype, policy, kind in ways:
        if dtypes and name_of(dtype) not in dtypes:
            continue
        yardstick = torch.bfloat16 if kind == "short" else dtype
        if yardstick not in eager:
            plain = _step(yardstick, device, None, "auto")
            eager[yardstick] = {name: relative_error(plain[name], exact[name]) for name in exact}
        errors = eager[yardstick]
        # One small tensor may round luckily: the typical error of the run counts as well.
        typical = sum(errors.values()) / len(errors)
        found = _step(dtype, device, policy, kind)
        for name, value in exact.items():
            block, tensor = _place(name)
            yield Check(
                op="block",
                shape=block,
                dtype=name_of(dtype),
                layout=f"{policy} {kind}",
                tensor=tensor,
                error=relative_error(found[name], value),
                reference_error=errors[name],
                allowed=max(errors[name], typical) / 2
                if kind == "short"
                else 2 * max(errors[name], typical) + floor(dtype, CONFIG.mlp_hidden),
                elements=value.numel(),
            )


def _place(name: str) -> tuple[str, str]:
    """ "blocks.0.mlp.layer1.up" as ("block 0", "mlp.layer1.up"); others are the whole DiT's."""
    words = name.replace("_modulation_", ".").split(".")
    place = next((i for i, word in enumerate(words) if word == "blocks"), None)
    return ("DiT", name) if place is None else (
        f"block {words[place + 1]}", ".".join(words[place + 2 :]))  # fmt: skip


def block_rows(
    device: Device = "cpu", quick: bool = False, dtypes: Sequence[str] = ()
) -> list[Measurement]:
    """`block_checks` as rows of a run file."""
    ways = QUICK if quick else WAYS
    return rows(block_checks(device, ways, dtypes), source_of(device))


def _curve(device: Device, fused: bool, target: Tensor, inputs: dict[str, Any]) -> list[float]:
    """The losses of twenty steps towards what a teacher says."""
    dit = _dit(torch.float32, device, "triton" if fused else "torch", ONE)
    network = add_lora(dit, rank=4, alpha=4.0, seed=1).to(device)
    if fused:
        fuse.fuse_blocks(dit)
    optimizer = torch.optim.AdamW(network.param_groups(), lr=0.02)
    losses = []
    for _ in range(STEPS):
        with dispatch.use("triton" if fused else "auto"), full_precision():
            loss = (dit(**inputs) - target).square().mean()
            network.zero_grad_flat()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_rows(device: Device = "cpu", quick: bool = False) -> list[Measurement]:
    """The losses of a run of the trainer, and unless `quick` those of the fused and eager DiT."""
    run = _losses("run", run_losses(), "host")
    if quick:
        return [run]
    inputs = _inputs(torch.float32, device)
    inputs |= {"latents": inputs["latents"][:1, :, :4, :4], "sigma": inputs["sigma"][:1]}
    inputs |= {"context": inputs["context"][:1, :3], "zero_keys": 507}
    teacher = _dit(torch.float32, device, config=ONE)
    _network(teacher, device)
    with torch.no_grad():
        target = teacher(**inputs)
    eager, own = (_curve(device, fused, target, inputs) for fused in (False, True))
    apart = max(abs(a / b - 1) for a, b in zip(own, eager, strict=True))
    note = f"the losses differ from eager's by {apart:.1e}" if apart > CURVE_LIMIT else ""
    found = [
        _losses("fused", own, source_of(device), note=note),
        _losses("fused", eager, source_of(device), provider="eager"),
    ]
    return [*found, run]


def _losses(
    mode: str, losses: list[float], source: str, provider: str = "own", note: str = ""
) -> Measurement:
    return Measurement(
        "loss", "loss", digits(losses[-1]), "loss", dtype="float32", provider=provider, mode=mode,
        parts={f"step {i:02}": digits(loss) for i, loss in enumerate(losses, 1)},
        source=source, note=note,
    )  # fmt: skip


DATASET = """[general]
resolution = 64
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
caption_extension = ".txt"
shuffle_caption = true
caption_dropout_rate = 0.2
caption_tag_dropout_rate = 0.2
flip_aug = true

[[datasets]]
[[datasets.subsets]]
image_dir = {folder}
"""


def run_losses() -> list[float]:
    """The losses of a short run on the CPU: order, flips, captions, noise, σ and dropout drawn."""
    from anima_fast.options.run import TrainOptions
    from anima_fast.training.loop import train

    with tempfile.TemporaryDirectory() as name, _quiet():
        folder = Path(name)
        stack = build_stack(folder / "models", blocks=2, width=64, head_dim=32, context_dim=32)
        images = folder / "images"
        images.mkdir()
        generator = np.random.default_rng(0)
        for index in range(6):
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            size = ((64, 64), (96, 48))[index % 2]
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            image.save(images / f"{index}.png")
            words = f"picture {index}, red tree, blue sky, number {index}"
            (images / f"{index}.txt").write_text(words, encoding="utf-8")
        data = folder / "data.toml"
        data.write_text(DATASET.format(folder=json.dumps(images.as_posix())), encoding="utf-8")
        options = TrainOptions(
            pretrained_model_name_or_path=str(stack.dit),
            qwen3=str(stack.qwen3),
            vae=str(stack.vae),
            t5_tokenizer_path=str(stack.t5_tokenizer),
            dataset_config=str(data),
            output_dir=str(folder / "run"),
            output_name="lora",
            network_module="networks.lora_anima",
            network_dim=4,
            network_alpha=4.0,
            network_dropout=0.1,
            learning_rate=1e-3,
            optimizer_type="AdamW",
            mixed_precision="no",
            cache_latents=True,
            gradient_accumulation_steps=2,
            max_train_steps=STEPS,
            seed=7,
            device="cpu",
        )
        train(options)
        lines = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = map(json.loads, lines)
    return [record["loss"] for record in records if record["kind"] == "step"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block a run prints nothing."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def rows_of(choice: Choice) -> Iterator[list[Measurement]]:
    """The rows that `bench run` asks for: errors of the block, losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with one_thread():
        if choice.wants("error") and choice.wants_op("block"):
            yield block_rows(device, choice.quick, choice.dtypes)
        if choice.wants("loss") and choice.wants_op("loss"):
            yield loss_rows(device, choice.quick)
