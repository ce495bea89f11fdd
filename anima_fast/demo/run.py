"""`anima-fast demo`: from photographs to a LoRA on a stand-in model, in a few minutes.

The models are tiny and random, made here (a VAE that can show photographs is trained first), so
neither a card nor a download is needed. Everything after that is what a user runs: `train` with the
options of the documentation, `convert`, `sample`. The demo overwrites only its own files.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anima_fast.demo.tiny_stack import Stack, build_stack, save_vae
from anima_fast.demo.vae import fit_vae
from anima_fast.device import one_thread
from anima_fast.errors import UserError
from anima_fast.files import atomic_write, write_text
from anima_fast.models.adapter_kinds import LORA
from anima_fast.options.run import TrainOptions
from anima_fast.options.sample import SampleOptions
from anima_fast.progress import Progress
from anima_fast.reports.run_page import write_report
from anima_fast.sampling import run_sample
from anima_fast.tools.convert import convert_file
from anima_fast.training.loop import train
from anima_fast.training.run import TrainResult

# Photographs inside the scikit-image wheel: function of skimage.data, caption, size of a preview
# (that of the bucket it is trained in).
PHOTOGRAPHS = {
    "astronaut": ("a photograph of an astronaut in an orange suit, flag, smile", (128, 128)),
    "chelsea": ("a photograph of a cat, close up, green eyes, whiskers", (160, 96)),
    "coffee": ("a photograph of a cup of coffee on a wooden table, spoon", (160, 96)),
    "rocket": ("a photograph of a rocket on the launch pad at night, dark sky", (160, 96)),
}
CAPTIONS = {name: caption for name, (caption, _) in PHOTOGRAPHS.items()}
RESOLUTION = 128
DATASET = """[general]
resolution = {resolution}
batch_size = 4
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 16
caption_extension = ".txt"

[[datasets]]
[[datasets.subsets]]
image_dir = {image_dir}
num_repeats = {repeats}
"""
EPOCHS = 4
# Previews while it trains, with the settings of those before and after.
PREVIEWS = tuple(
    f"{caption} --w {width} --h {height} --s {{steps}} --l 1 --fs 1 --d {{seed}}"
    for caption, (width, height) in list(PHOTOGRAPHS.values())[:2]
)


@one_thread()
def run_demo(
    out: str | Path, *, seed: int = 0, vae_steps: int = 300, repeats: int = 120, steps: int = 12
) -> Path:
    """Train a LoRA on four photographs and write `report.html`.

    Args:
        out: folder to fill; files of an earlier demo are replaced.
        vae_steps: training steps of the stand-in VAE.
        repeats: of each photograph in an epoch; four epochs are trained.
        steps: Euler steps of a preview.
    Returns:
        The report.
    Raises:
        UserError: scikit-image is missing, or the folder cannot be written.
    """
    out, started = Path(out), time.perf_counter()
    with Progress() as progress:
        images = write_photographs(out, repeats)
        progress.say(f"wrote {len(images)} photographs with captions to {out / 'photographs'}")
        stack = build_models(out / "models", images, vae_steps, seed, progress)
        before = render_previews(out, stack, "before", seed, steps, lora=None)
        progress.say("rendered the previews before training")
    result = train(train_options(out, stack, seed, steps))
    # Only a run that asks for the memory plan alone has no result.
    assert result is not None
    if result.interrupted_by:
        raise KeyboardInterrupt
    comfyui = result.output.with_name("demo_lora_comfyui.safetensors")
    convert_file(result.output, comfyui, to="comfyui")
    after = render_previews(out, stack, "after", seed, steps, lora=result.output)
    seconds = time.perf_counter() - started
    report = write_demo_report(out, result, comfyui, before, after, seconds)
    with Progress() as progress:
        progress.say(f"LoRA: {result.output} (ComfyUI names: {comfyui.name})")
        progress.say(f"report: {report}")
    return report


def write_photographs(out: Path, repeats: int) -> dict[str, Image.Image]:
    """The photographs with a caption file each, and the dataset file; returns them by name."""
    try:
        from skimage import data
    except ImportError as error:
        raise UserError(
            'the demo takes its photographs from scikit-image: pip install "anima-fast[demo]"'
        ) from error
    images, folder = {}, out / "photographs"
    for name, caption in CAPTIONS.items():
        images[name] = Image.fromarray(getattr(data, name)()).convert("RGB")
        with atomic_write(folder / f"{name}.png") as file:
            images[name].save(file, "PNG")
        write_text(folder / f"{name}.txt", caption + "\n")
    # A JSON string is a TOML string too, whatever characters the path has.
    image_dir = json.dumps(folder.resolve().as_posix())
    text = DATASET.format(resolution=RESOLUTION, image_dir=image_dir, repeats=repeats)
    write_text(out / "data.toml", text)
    return images


def build_models(
    folder: Path, images: dict[str, Image.Image], vae_steps: int, seed: int, progress: Progress
) -> Stack:
    """A random DiT, LLM adapter, text encoder and tokenizers, and a VAE fitted to the images."""
    stack = build_stack(
        folder, seed=seed, blocks=4, width=128, context_dim=64, captions=CAPTIONS.values()
    )
    progress.say(f"built a random stand-in for the models in {folder}")

    def show(step: int, loss: float) -> None:
        if step % max(1, vae_steps // 3) == 0:
            progress.say(f"  training a VAE for it: step {step}/{vae_steps}, loss {loss:.3f}")

    vae = fit_vae(
        [to_tensor(image) for image in images.values()], steps=vae_steps, seed=seed, on_step=show
    )
    save_vae(vae, stack.vae)
    return stack


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image at the area of the training buckets, [3, H, W] in [-1, 1]."""
    scale = RESOLUTION / (image.width * image.height) ** 0.5
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def train_options(out: Path, stack: Stack, seed: int, steps: int) -> TrainOptions:
    """The documentation's command, with what four photographs and a CPU need changed."""
    return TrainOptions(
        pretrained_model_name_or_path=str(stack.dit),
        qwen3=str(stack.qwen3),
        vae=str(stack.vae),
        t5_tokenizer_path=str(stack.t5_tokenizer),
        dataset_config=str(out / "data.toml"),
        output_dir=str(out / "run"),
        output_name="demo_lora",
        save_model_as="safetensors",
        network_module=LORA.module,
        network_dim=64,
        network_alpha=64.0,
        learning_rate=3e-3,
        optimizer_type="AdamW8bit",
        lr_scheduler="cosine",
        lr_warmup_steps=30,
        timestep_sampling="sigmoid",
        discrete_flow_shift=1.0,
        max_train_epochs=EPOCHS,
        save_every_n_epochs=2,
        # The weights of a toy are small: half precision would only be slower on a CPU.
        mixed_precision="no",
        cache_latents=True,
        cache_text_encoder_outputs=True,
        vae_chunk_size=64,
        vae_disable_cache=True,
        sample_prompt=tuple(text.format(steps=steps, seed=seed) for text in PREVIEWS),
        sample_at_first=True,
        sample_every_n_epochs=1,
        seed=seed,
        device="cpu",
    )


def render_previews(
    out: Path, stack: Stack, stage: str, seed: int, steps: int, lora: Path | None
) -> dict[str, Path]:
    """A picture for each caption."""
    pictures = {}
    for name, (caption, (width, height)) in PHOTOGRAPHS.items():
        options = SampleOptions(
            dit=str(stack.dit),
            qwen3=str(stack.qwen3),
            vae=str(stack.vae),
            t5_tokenizer_path=str(stack.t5_tokenizer),
            lora=(str(lora),) if lora else (),
            prompt=caption,
            seed=seed,
            steps=steps,
            cfg=1.0,
            shift=1.0,
            width=width,
            height=height,
            dtype="fp32",
            device="cpu",
            output=str(out / "previews" / f"{name}-{stage}.png"),
        )
        pictures[caption] = run_sample(options, quiet=True)
    return pictures


def write_demo_report(
    out: Path,
    result: TrainResult,
    comfyui: Path,
    before: dict[str, Path],
    after: dict[str, Path],
    seconds: float,
) -> Path:
    """`report.html` with the curves of the run and the pictures before and after."""
    folder = out / "photographs"
    return write_report(
        out / "report.html",
        title="anima_fast demo",
        lead="A LoRA trained on four photographs, on a tiny stand-in for the Anima model. The "
        "curves are those of a real run; the pictures show that all parts work together, not "
        "what the real model draws.",
        facts={
            "LoRA": str(result.output),
            "with ComfyUI names": str(comfyui),
            "steps": str(result.steps),
            "loss (average over the last epoch)": f"{result.loss:.4f}",
            "whole demo": f"{seconds:.0f} s",
        },
        log=result.log,
        galleries={
            "Photographs": {text: folder / f"{name}.png" for name, text in CAPTIONS.items()},
            "Previews before training": before,
            "Previews with the LoRA": after,
        },
    )
