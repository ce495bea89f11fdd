"""A tiny random-weight stack, a small captioned dataset and the options to train on them."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from anima_fast.demo.tiny_stack import build_stack
from anima_fast.options.run import TrainOptions

SIZES = ((64, 64), (64, 64), (96, 48), (48, 96), (64, 64))


def make_images(folder: Path, count: int = 5, seed: int = 0) -> Path:
    """Smooth random pictures of a few aspect ratios with a .txt caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(SIZES[index % len(SIZES)], Image.Resampling.BICUBIC)
        image.save(folder / f"image{index}.png")
        text = f"picture {index}, red tree, blue sky, number {index}"
        (folder / f"image{index}.txt").write_text(text, encoding="utf-8")
    return folder


def make_config(path: Path, image_dir: Path, *, batch_size: int = 2, subset: str = "") -> Path:
    """A dataset TOML for one folder; `subset` is extra TOML for the subset."""
    path.write_text(
        f"""
[general]
resolution = 64
batch_size = {batch_size}
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
caption_extension = ".txt"

[[datasets]]
[[datasets.subsets]]
image_dir = {str(image_dir)!r}
{subset}
""",
        encoding="utf-8",
    )
    return path


def make_world(folder: Path, blocks: int = 2, **config: object) -> dict:
    """Build stack, images and config under `folder`; returns the options that name them."""
    stack = build_stack(folder / "models", blocks=blocks, width=64, head_dim=32, context_dim=32)
    data = make_config(folder / "data.toml", make_images(folder / "images"), **config)
    return named(stack, data)


def named(stack, data: Path) -> dict:
    """The options that name the models of a stack and a dataset file."""
    return {
        "pretrained_model_name_or_path": str(stack.dit),
        "qwen3": str(stack.qwen3),
        "vae": str(stack.vae),
        "t5_tokenizer_path": str(stack.t5_tokenizer),
        "dataset_config": str(data),
    }


def train_options(world: dict, output: Path, **changes: object) -> TrainOptions:
    """Options of a short exact CPU run; `changes` win."""
    values = {
        **world,
        "output_dir": str(output),
        "output_name": "lora",
        "network_module": "networks.lora_anima",
        "network_dim": 4,
        "network_alpha": 4.0,
        "learning_rate": 1e-3,
        "optimizer_type": "AdamW",
        "mixed_precision": "no",
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "max_train_epochs": 2,
        "seed": 7,
        "device": "cpu",
        **changes,
    }
    return TrainOptions(**values)


def records(folder: Path, kind: str = "step") -> list[dict]:
    """The lines of a kind in a run's log.jsonl."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def assert_close_files(a: Path, b: Path, *, atol: float = 1e-4, rtol: float = 1e-3) -> None:
    """Two files hold tensors of the same names and nearly the same values.

    Adam divides a gradient by its own size, so a single element whose gradient is near zero may
    move by a tenth of a step (atol) when sums round otherwise; a whole tensor may not (rtol).
    """
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], atol=atol, rtol=rtol)
        difference = (left[key].float() - right[key].float()).norm()
        assert difference <= rtol * right[key].float().norm() + 1e-6, key


RUNNER = """
import json, sys
from anima_fast.options import run
from anima_fast.training.loop import train
train(getattr(run, sys.argv[1])(**json.loads(sys.argv[2])))
"""


def spawn(options) -> subprocess.Popen:
    """A training run in a process of its own."""
    fields = (f for f in dataclasses.fields(options) if f.init)
    given = {
        f.name: getattr(options, f.name) for f in fields if getattr(options, f.name) != f.default
    }
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, type(options).__name__, json.dumps(given)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_steps(folder: Path, count: int) -> None:
    """Return when the run of an output folder has logged so many steps."""
    log, deadline = folder / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and log.read_text(encoding="utf-8").count("step_s") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{log} never reached {count} steps")
