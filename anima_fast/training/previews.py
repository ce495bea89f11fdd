"""Pictures while it trains: the same as `anima-fast sample` makes with the LoRA of that moment.

Texts are encoded at the start, with the models that the captions need anyway; what is trained of
the text path runs again at each preview. Dropouts are off, schedule-free optimizers show their
averaged weights, the random state is put back, and whatever goes wrong is one warning: training
goes on.

Files: OUTPUT_DIR/sample/ + [NAME_] + e000004 or 000500 + _IDX_TIMESTAMP[_SEED].png
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.adapters.network import LoRANetwork
from anima_fast.data.encode_models import TextModels, load_run_tokenizers
from anima_fast.device import set_backends
from anima_fast.errors import UserError
from anima_fast.memory.free import free_memory, is_out_of_memory
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.sampling.euler import euler_sample, start_noise
from anima_fast.sampling.jobs import Job
from anima_fast.sampling.pictures import describe, save_png, to_image, unescape
from anima_fast.sampling.prompts import Prompt, collect_prompts, say_ignored
from anima_fast.sampling.texts import (
    PromptTokens,
    adapt,
    encode_states,
    tokenize_prompt,
    zero_keys,
)
from anima_fast.training.checkpoints import SAVE_DTYPES
from anima_fast.training.optimizers.build import averaged_weights

if TYPE_CHECKING:
    from anima_fast.options.run import TrainOptions
    from anima_fast.training.position import Position
    from anima_fast.training.run import Run

FOLDER = "sample"
Say = Callable[[str], None]


@dataclass
class Previews:
    """The prompts of a run and their encoded texts.

    Attributes:
        prompts: as read at the start.
        texts: what the text path needs, by text; empty where it runs whole at each preview.
    """

    options: TrainOptions
    prompts: list[Prompt]
    texts: Mapping[str, PreviewText] = field(default_factory=dict)
    live: bool = False

    def due_at_first(self, position: Position) -> bool:
        """Whether pictures are wanted before the first step."""
        return self.options.sample_at_first and position.step == 0

    def due_after_step(self, step: int) -> bool:
        """Whether pictures are wanted now; epochs win where both are given."""
        every = self.options.sample_every_n_steps
        return bool(every) and not self.options.sample_every_n_epochs and step % every == 0

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether pictures are wanted after an epoch, counted from 1."""
        every = self.options.sample_every_n_epochs
        return bool(every) and epoch % every == 0

    def make(
        self, run: Run, stage: str, *, say: Say, stopped: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Render every prompt.

        Args:
            run: the run, whose network is used as it is now.
            stage: e000004 after epoch 4, 000500 after step 500.
            say: gets one line for each picture that went wrong.
            stopped: asked between pictures.

        Returns:
            The files made, relative to the output folder.
        """
        made = []
        run.network.eval()
        run.network.multiplier = 1.0
        try:
            devices = [run.device] if run.device.type == "cuda" else []
            weights, rounding = averaged_weights(run.optimizer), computed_as_sample(run)
            random = torch.random.fork_rng(devices)
            with random, weights, weights_as_saved(run), rounding, torch.no_grad():
                for index, prompt in enumerate(self.current(say)):
                    if stopped():
                        break
                    try:
                        made.append(self._make_one(run, prompt, stage, index))
                    except Exception as error:
                        say(f"no preview of prompt {index + 1}: {one_line(error)}")
        # A preview is a help, and no reason to lose a run.
        except Exception as error:
            say(f"no preview: {one_line(error)}")
        finally:
            run.network.train()
            free_memory(run.device, keep_cached=run.options.highvram)
        return made

    def current(self, say: Say) -> list[Prompt]:
        """The prompts as they are in their file now; what cannot be had is said and left out."""
        try:
            prompts = collect_prompts(self.options)
        except UserError as error:
            say(f"the prompts of the start are used: {error}")
            prompts = self.prompts
        if self.live:
            return prompts
        known = [p for p in prompts if all(unescape(text) in self.texts for text in p.texts)]
        if len(known) < len(prompts):
            say(f"{len(prompts) - len(known)} prompts are new: they are shown when the run resumes")
        return known

    def _make_one(self, run: Run, prompt: Prompt, stage: str, index: int) -> str:
        seed = secrets.randbelow(2**32) if prompt.seed is None else prompt.seed
        job = Job(
            prompt.text, prompt.negative, seed, prompt.steps, prompt.cfg, prompt.shift,
            prompt.width, prompt.height,
        )  # fmt: skip
        pixels = decode(run, self._sample(run, job))
        stamp = time.strftime("%Y%m%d%H%M%S")
        name = f"{stage}_{index:02d}_{stamp}"
        name = f"{self.options.output_name}_{name}" if self.options.output_name else name
        name = name if prompt.seed is None else f"{name}_{seed}"
        path = Path(self.options.output_dir) / FOLDER / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = describe(job, self.options.pretrained_model_name_or_path)
        save_png(path, to_image(pixels), facts)
        return f"{FOLDER}/{path.name}"

    def _sample(self, run: Run, job: Job) -> Tensor:
        contexts = [self._context(run, text) for text in job.texts]
        return euler_sample(
            run.dit,
            start_noise(job.seed, job.width, job.height),
            contexts[0],
            contexts[1] if len(contexts) > 1 else None,
            steps=job.steps,
            shift=job.shift,
            guidance=job.cfg,
            zero_keys=zero_keys(contexts[0]),
            negative_zero_keys=zero_keys(contexts[-1]),
        )

    def _context(self, run: Run, text: str) -> Tensor:
        """What the DiT reads, on the device, through whatever is trained of the text path."""
        parts, text = run.conditioning, unescape(text)
        if self.live:
            tokens = tokenize_prompt(parts.tokenizers, text)
            states = encode_states(tokens, parts.text_encoder, run.device)
            return adapt(tokens, states.to(parts.dtype), parts.adapter)
        found = self.texts[text]
        if found.context is not None:
            return found.context.to(run.device, parts.dtype)
        return adapt(found.tokens, found.states.to(run.device, parts.dtype), parts.adapter)


@contextmanager
def weights_as_saved(run: Run) -> Iterator[None]:
    """Inside the block a LoRA has the weights of its file, where that holds fewer digits.

    A whole model is not copied for it.
    """
    dtype = SAVE_DTYPES[run.options.save_precision]
    if dtype is None or not isinstance(run.network, LoRANetwork):
        yield
        return
    flat = run.network.flat
    own = flat.detach().clone()
    with torch.no_grad():
        flat.copy_(own.to(dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            flat.copy_(own)


@contextmanager
def computed_as_sample(run: Run) -> Iterator[None]:
    """Inside the block the card rounds as in `sample`, whatever the run allows for speed."""
    options, adapter = run.options, run.conditioning.adapter
    fused = adapter is not None and adapter.fused
    set_backends()
    if fused:
        adapter.fuse_norms(False)
    try:
        yield
    finally:
        set_backends(tf32=options.cuda_allow_tf32, benchmark=options.cuda_cudnn_benchmark)
        if fused:
            adapter.fuse_norms()


@dataclass(frozen=True)
class PreviewText:
    """A text before what is trained: its context [1, S, C], or its states [1, N, C]; on the CPU."""

    tokens: PromptTokens
    states: Tensor | None = None
    context: Tensor | None = None


def prepare_previews(
    options: TrainOptions, text_mode: str, *, device: torch.device, dtype: torch.dtype, say: Say
) -> Previews | None:
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
        return Previews(options, prompts, live=True)
    say("encoding the prompts of previews")
    texts = [unescape(text) for prompt in prompts for text in prompt.texts]
    encoded = encode_texts(options, list(dict.fromkeys(texts)), text_mode, device, dtype)
    return Previews(options, prompts, encoded)


@torch.no_grad()
def encode_texts(
    options: TrainOptions,
    texts: list[str],
    text_mode: str,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, PreviewText]:
    """Each text as far as nothing of it is trained."""
    tokenizers = load_run_tokenizers(options)
    models = TextModels(options, device, dtype, keep_cached=options.highvram)
    found = {}
    for text in texts:
        tokens = tokenize_prompt(tokenizers, text)
        states = encode_states(tokens, models.encoder(), device)
        if text_mode == "states":
            found[text] = PreviewText(tokens, states=states.cpu())
        else:
            found[text] = PreviewText(tokens, context=adapt(tokens, states, models.adapter()).cpu())
    models.free()
    return found


def decode(run: Run, latents: Tensor) -> Tensor:
    """[1, 16, 1, h, w] → pixels [3, H, W]; the VAE is loaded for it and freed."""
    if not torch.isfinite(latents).all():
        raise UserError("the sampled latents are not finite")
    # In half precision flat areas of the picture show steps, so it is float32 as in `sample`.
    vae = load_vae(run.options.vae, device=run.device, dtype=torch.float32)
    return vae.decode(latents.squeeze(2), chunk_rows=run.options.vae_chunk_size)[0]


def one_line(error: BaseException) -> str:
    """What went wrong, for a line at the console."""
    if is_out_of_memory(error):
        return "out of memory: use smaller --w and --h in the prompts, or --vae_chunk_size 64"
    return f"{' '.join(str(error).split())[:300] or type(error).__name__}"
