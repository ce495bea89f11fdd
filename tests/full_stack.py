"""A tiny stack with enough blocks to swap some, and options of short full fine-tuning runs."""

import json
from pathlib import Path

from stack import make_config, make_images, named

from anima_fast.demo.tiny_stack import build_stack
from anima_fast.options.run import FinetuneOptions

BLOCKS = 4


def make_full_world(folder: Path, **config: object) -> dict:
    """Models, images and a dataset file under `folder`; the options that name them."""
    stack = build_stack(
        folder / "models", blocks=BLOCKS, width=32, head_dim=16, context_dim=32, adapter_layers=1
    )
    data = make_config(folder / "data.toml", make_images(folder / "images"), **config)
    return named(stack, data)


def full_options(world: dict, output: Path, **changes: object) -> FinetuneOptions:
    """Options of a short exact CPU run; `changes` win."""
    values = {
        **world,
        "output_dir": str(output),
        "output_name": "full",
        "learning_rate": 1e-3,
        "mixed_precision": "no",
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "max_train_epochs": 1,
        "seed": 7,
        "device": "cpu",
        **changes,
    }
    return FinetuneOptions(**values)


def log_lines(result) -> list[dict]:
    """The step records of a run."""
    lines = result.log.read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]
