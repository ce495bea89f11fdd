"""Pictures while it trains: the same as `anima-fast sample` makes with the LoRA of that moment.

Dropout is off, schedule-free optimizers show their averaged weights, the random state is put back,
and whatever goes wrong is one warning: training goes on.

Files: OUTPUT_DIR/sample/ + [NAME_] + e000004 or 000500 + _IDX_TIMESTAMP[_SEED].png
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.device import set_backends
from anima_fast.errors import UserError, reason
from anima_fast.memory.free import free_memory, is_out_of_memory
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.sampling.euler import sample_jobs
from anima_fast.sampling.pictures import generation_parameters, save_png, to_image
from anima_fast.sampling.prompts import Job, Prompt
from anima_fast.training.kind import Say, given
from anima_fast.training.optimizers.build import averaged_weights
from anima_fast.training.preview_prompts import PreviewPrompts

if TYPE_CHECKING:
    from anima_fast.options.output import PreviewOptions
    from anima_fast.training.run import Run

FOLDER = "sample"


class _BrokenOffError(Exception):
    """The run stops while a picture is being made."""


class Previews:
    """Makes the pictures of a run, with its network as it is at the time."""

    def __init__(self, run: Run, prompts: PreviewPrompts) -> None:
        self.run, self.prompts = run, prompts
        self.options: PreviewOptions = run.options

    def make(
        self, stage: str, *, say: Say, stopped: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Render every prompt; returns the files made, relative to the output folder.

        Args:
            stage: e000004 after epoch 4, 000500 after step 500.
            say: gets one line for each picture that went wrong.
            stopped: asked after each step of the sampler; a picture in progress is left unfinished.
        """
        made: list[str] = []
        run = self.run

        def on_step() -> None:
            if stopped():
                raise _BrokenOffError

        run.network.eval()
        run.network.multiplier = 1.0
        try:
            devices = [run.device] if run.device.type == "cuda" else []
            weights, rounding = averaged_weights(run.optimizer), computed_as_sample(run)
            random, saved = torch.random.fork_rng(devices), run.training.preview_weights()
            with random, weights, saved, rounding, torch.no_grad():
                for index, prompt in enumerate(self.prompts.current(self.options, say)):
                    try:
                        on_step()
                        made.append(self._make_one(prompt, stage, index, on_step))
                    except _BrokenOffError:
                        break
                    except Exception as error:
                        say(f"no preview of prompt {index + 1}: {explain(error)}")
        # No preview is worth losing a run.
        except Exception as error:
            say(f"no preview: {explain(error)}")
        finally:
            run.network.train()
            free_memory(run.device, keep_cached=run.options.highvram)
        return made

    def _make_one(self, prompt: Prompt, stage: str, index: int, on_step: Callable[[], None]) -> str:
        seed = secrets.randbelow(2**32) if prompt.seed is None else prompt.seed
        job, run = Job.of(prompt, seed), self.run
        contexts = [self.prompts.context(run.conditioning, text) for text in job.texts]
        pixels = decode(run, sample_jobs(run.dit, [job], contexts, on_step=on_step))
        stamp = time.strftime("%Y%m%d%H%M%S")
        name = f"{stage}_{index:02d}_{stamp}"
        name = f"{run.options.output_name}_{name}" if run.options.output_name else name
        name = name if prompt.seed is None else f"{name}_{seed}"
        path = run.folder / FOLDER / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = generation_parameters(job, given(run.options.pretrained_model_name_or_path))
        save_png(path, to_image(pixels), facts)
        return f"{FOLDER}/{path.name}"


@contextmanager
def computed_as_sample(run: Run) -> Iterator[None]:
    """Inside the block the card rounds as in `sample`, whatever the run allows for speed."""
    options, adapter = run.options, run.conditioning.adapter
    fused = adapter if adapter is not None and adapter.fused else None
    set_backends()
    if fused is not None:
        fused.fuse_norms(False)
    try:
        yield
    finally:
        set_backends(tf32=options.cuda_allow_tf32, benchmark=options.cuda_cudnn_benchmark)
        if fused is not None:
            fused.fuse_norms()


def decode(run: Run, latents: Tensor) -> Tensor:
    """[1, 16, 1, h, w] → pixels [3, H, W]; the VAE is loaded for it and freed."""
    if not torch.isfinite(latents).all():
        raise UserError("the sampled latents are not finite")
    # In half precision flat areas of the picture show steps, so it is float32 as in `sample`.
    vae = load_vae(given(run.options.vae), device=run.device, dtype=torch.float32)
    return vae.decode(latents.squeeze(2), chunk_rows=run.options.vae_chunk_size)[0]


def explain(error: BaseException) -> str:
    """What went wrong with a picture, for a line at the console."""
    if is_out_of_memory(error):
        return "out of memory: use smaller --w and --h in the prompts, or --vae_chunk_size 64"
    return reason(error)
