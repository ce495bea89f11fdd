"""`anima-fast sample`: all pictures of a command, each model loaded once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from anima_fast.adapters.network import LoRANetwork
from anima_fast.data.encode_models import load_run_tokenizers
from anima_fast.device import DTYPES, choose_device, set_backends, uses_fused_blocks
from anima_fast.errors import UserError
from anima_fast.measure.arithmetic import Arithmetic, machine, resolve, sums_of_run
from anima_fast.measure.sums import card_facts, measured_sums
from anima_fast.measure.verdict import unless_refused
from anima_fast.memory.free import free_memory
from anima_fast.memory.offload import install_block_runner
from anima_fast.models import text_encoder
from anima_fast.models.attention import check_attn_mode
from anima_fast.models.checkpoint import Checkpoint
from anima_fast.models.dit import dit_tensors, load_dit
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.models.model_files import check_model_files, given
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.options.sample import SampleOptions
from anima_fast.progress import Progress
from anima_fast.sampling.euler import sample_jobs
from anima_fast.sampling.grid import Axis, compose, expand, read_axes
from anima_fast.sampling.loras import LoRAFile, attach_lora, check_fit
from anima_fast.sampling.pictures import (
    PicturePaths,
    comfyui_prompt,
    generation_parameters,
    load_start,
    picture_size,
    save_png,
    to_image,
)
from anima_fast.sampling.prompts import Job, batches, make_jobs, unescape
from anima_fast.sampling.texts import encode_prompts

# A context belongs to a text and, where LoRA files change the text path, to their weights.
Contexts = dict[tuple[str, tuple[float, ...]], Tensor]


@dataclass
class Session:
    """What the phases of a command share."""

    options: SampleOptions
    dit: str
    qwen3: str
    vae: str
    device: torch.device
    arithmetic: Arithmetic
    loras: list[LoRAFile]
    jobs: list[Job]
    say: Callable[[str], None]
    progress: Progress | None
    start: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def lora_paths(self) -> list[str]:
        """Paths of the LoRA files."""
        return [str(lora.path) for lora in self.loras]


def run_sample(options: SampleOptions, *, quiet: bool = False) -> Path:
    """Render pictures and write them as PNG; all of `anima-fast sample`.

    Returns the file: the grid where one is asked for, else the first picture. Text chunks say how
    it was made. `quiet`: no messages and no progress.

    Raises:
        UserError: missing or wrong files, a LoRA that does not fit, no memory, a folder that
            cannot be written, or numbers that are not finite.
        KeyboardInterrupt: passed on; the pictures that were sampled before it are written.
    """
    check_model_files(
        options.dit, options.qwen3, options.vae, options.llm_adapter_path, dit_option="dit"
    )
    dit, qwen3 = given(options.dit, "dit"), given(options.qwen3, "qwen3")
    vae = given(options.vae, "vae")
    notices: list[str] = []
    jobs, axes, loras = _plan(options, dit, notices.append)
    device = choose_device(options.device)
    arithmetic = _arithmetic(options, dit, device, notices.append)
    dtype = DTYPES[arithmetic.precision]
    check_attn_mode(options.attn_mode, training=False, device=device, dtype=dtype)
    set_backends()
    sheets = [expand(job, axes) for job in jobs] if axes else []
    if sheets:
        jobs = [job for rows in sheets for row in rows for job in row]
    outputs = PicturePaths(options.output, len(jobs), grid=bool(axes))
    with Progress() as progress, torch.no_grad(), sums_of_run(arithmetic.chain):
        say = (lambda text: None) if quiet else progress.say
        for notice in (*notices, *_without_effect(options, jobs)):
            say(notice)
        shown = None if quiet else progress
        session = Session(options, dit, qwen3, vae, device, arithmetic, loras, jobs, say, shown)
        images = _render(session, outputs)
        if session.interrupted:
            raise KeyboardInterrupt
        cells = iter(images)
        for number, rows in enumerate(sheets):
            sheet = compose([[next(cells) for _ in row] for row in rows], axes)
            path = outputs.grid(number)
            save_png(path, sheet, generation_parameters(rows[0][0], dit, session.lora_paths))
            say(f"wrote {path}")
    return outputs.grid(0) if sheets else outputs.picture(0)


def _arithmetic(
    options: SampleOptions, dit: str, device: torch.device, say: Callable[[str], None]
) -> Arithmetic:
    """What training takes here for this model, or what --dtype says."""
    where = machine(
        device, options.kernels, short=lambda: measured_sums(card_facts(device), device, say)
    )
    found = resolve(options.dtype, options.sums, where)
    if device.type != "cuda":
        return found
    found = unless_refused(found, card_facts(device), dit)
    if found.precision == "fp16" and "auto" in (options.dtype, options.sums):
        say(f"precision: {found.text} ({found.reason})")
    return found


def _plan(
    options: SampleOptions, dit: str, say: Callable[[str], None]
) -> tuple[list[Job], list[Axis], list[LoRAFile]]:
    """The pictures before a grid multiplies them, its axes, and all LoRA files."""
    if options.init_image and Path(options.init_image).resolve() == Path(options.output).resolve():
        raise UserError(f"--output {options.output} is --init_image itself: give another name")
    size = picture_size(options.init_image) if options.init_image else None
    jobs = make_jobs(options, size, say)
    files = list(options.loras)
    axes = read_axes(options.grid, len(files), [job.text for job in jobs])
    for axis in axes:
        if axis.name == "lora":
            files += [(path, options.lora_weight) for path in axis.values]
        if axis.name == "strength" and not options.init_image:
            raise UserError("--grid strength needs --init_image FILE")
    for path, weight in files:
        if not math.isfinite(weight):
            raise UserError(f"--lora {path}:{weight}: the weight must be a finite number")
    loras = [LoRAFile.read(path, weight) for path, weight in files]
    check_fit(loras, dit_tensors(Checkpoint.open(dit)).shapes)
    weights = tuple(weight for _, weight in files)
    return [replace(job, weights=weights) for job in jobs], axes, loras


def _without_effect(options: SampleOptions, jobs: Sequence[Job]) -> Iterator[str]:
    """Notices about options that change nothing."""
    if options.negative_prompt and all(job.cfg == 1 for job in jobs):
        yield "--negative_prompt has no effect with --cfg 1"
    if options.init_image and all(job.strength == 1 for job in jobs):
        yield "--init_image gives its size only with --strength 1: use a smaller one, such as 0.6"


def _render(session: Session, outputs: PicturePaths) -> list[Image.Image]:
    """Render all pictures and write them one by one; returns them for grids."""
    options, loras = session.options, session.lora_paths
    if options.init_image and any(job.strength != 1 for job in session.jobs):
        sizes = {(job.width, job.height) for job in session.jobs}
        session.say("encoding the picture to start from")
        session.start = load_start(
            options.init_image, session.vae, sizes, device=session.device,
            chunk_rows=options.vae_chunk_size,
        )  # fmt: skip
    contexts = _encode(session)
    latents = _sample(session, contexts)
    session.say("decoding")
    images = []
    with _enough_memory("use a smaller --vae_chunk_size, such as 64"):
        # In half precision flat areas of the decoded picture show banding.
        vae = load_vae(session.vae, device=session.device, dtype=torch.float32)
        # Fewer latents than jobs after Ctrl-C.
        for number, (job, latent) in enumerate(zip(session.jobs, latents, strict=False)):
            pixels = vae.decode(latent[None].to(session.device), chunk_rows=options.vae_chunk_size)
            image, path = to_image(pixels[0]), outputs.picture(number)
            nodes = comfyui_prompt(
                job, dit=session.dit, qwen3=session.qwen3, vae=session.vae, loras=loras,
                init_image=options.init_image, weighted=not options.no_prompt_weights,
            )  # fmt: skip
            save_png(path, image, generation_parameters(job, session.dit, loras), nodes)
            session.say(f"wrote {path}")
            if options.grid:
                images.append(image)
    return images


def _encode(session: Session) -> Contexts:
    """Text phase: encode every text once for each set of weights that changes it."""
    options, device = session.options, session.device
    dtype = DTYPES[session.arithmetic.encoders]
    session.say("encoding the prompt")
    tokenizers = load_run_tokenizers(options)
    encoder = text_encoder.load_text_encoder(session.qwen3, device=device, dtype=dtype)
    adapter = load_llm_adapter(options.llm_adapter_path or session.dit, device=device, dtype=dtype)
    attached = [
        attach_lora(lora, text_encoder=encoder, llm_adapter=adapter) for lora in session.loras
    ]
    # Where no file has modules for the text path, one context serves all weights.
    encoded: Contexts = {}
    found: Contexts = {}
    for job in session.jobs:
        pairs = zip(job.weights, attached, strict=True)
        key = tuple(weight for weight, network in pairs if network is not None)
        for text in job.texts:
            if (text, key) not in encoded:
                _set_weights(attached, job.weights)
                (encoded[text, key],) = encode_prompts(
                    [unescape(text)], tokenizers, encoder, adapter, device=device,
                    weighted=not options.no_prompt_weights,
                )  # fmt: skip
            found[text, job.weights] = encoded[text, key]
    del encoder, adapter, attached
    free_memory(device, keep_cached=False)
    return found


def _set_weights(networks: Sequence[LoRANetwork | None], weights: Sequence[float]) -> None:
    for network, weight in zip(networks, weights, strict=True):
        if network is not None:
            network.multiplier = weight


def _sample(session: Session, contexts: Contexts) -> list[Tensor]:
    """Sampling phase: latents [16, h, w] float32 on the CPU, in the order of the jobs."""
    options, device = session.options, session.device
    session.say("loading the DiT")
    precision = session.arithmetic.precision
    dtype = DTYPES[precision]
    dit = load_dit(session.dit, device=device, dtype=dtype, attn_mode=options.attn_mode)
    attached = [attach_lora(lora, dit=dit) for lora in session.loras]
    if uses_fused_blocks(options.kernels, device):
        install_block_runner(dit, fused=True)
    groups = batches(session.jobs, options.batch_size)
    count = len(session.jobs)
    what = f", seed {session.jobs[0].seed}" if count == 1 else f" {count} pictures"
    session.say(f"sampling{what}")
    on_step = None
    if session.progress is not None:
        session.progress.start(0, sum(group[0].steps for group in groups))
        on_step = _stepper(session.progress)
    found: list[Tensor] = []
    try:
        for group in groups:
            job = group[0]
            _set_weights(attached, job.weights)
            with _enough_memory("use a smaller --width, --height or --batch_size"):
                texts = [contexts[text, job.weights].to(dtype) for text in job.texts]
                start = session.start.get((job.width, job.height))
                latents = sample_jobs(dit, group, texts, start=start, on_step=on_step)
            if not torch.isfinite(latents).all():
                wider = {"fp16": ", or --dtype bf16", "bf16": ", or --dtype fp32"}
                raise UserError(
                    f"the sampled latents are not finite with --dtype {precision}: use a smaller "
                    f"--cfg or LoRA weight{wider.get(precision, '')}"
                )
            found += list(latents.squeeze(2).cpu())
    except KeyboardInterrupt:
        if not found:
            raise
        session.interrupted = True
        session.say(f"stopped: {len(found)} of {count} pictures are sampled and kept")
    if (saturation := dit.saturation) is not None:
        saturation.tell(session.say, "--dtype bf16 when the pictures suffer")
    del dit, attached
    free_memory(device, keep_cached=False)
    return found


def _stepper(progress: Progress) -> Callable[[], None]:
    """Shows each finished step and the seconds it took."""
    last, done = time.perf_counter(), 0

    def step() -> None:
        nonlocal last, done
        now, done = time.perf_counter(), done + 1
        progress.step({"step": done, "step_s": now - last})
        last = now

    return step


@contextmanager
def _enough_memory(remedy: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {remedy}") from error
