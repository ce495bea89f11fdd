"""From a prompt to a picture: Euler steps of the rectified flow, with classifier-free guidance.

    σ_i = S·s_i / (1 + (S − 1)·s_i),  s = 1 … 0 in `steps` equal steps
    v   = v_neg + g·(v_pos − v_neg)                     two forwards; one when g = 1
    x   ← x + (σ_{i+1} − σ_i)·v                         x and v in float32, x_0 = noise

`run_sample` is the whole of `anima-fast sample`. It loads each model, uses it and frees it before
the next: text encoder and LLM adapter, DiT, VAE. LoRA files stay beside the weights instead of
being merged, so that a half-precision model does not round them away.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anima_fast.adapters import names
from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.lora import LoRANetwork, add_lora
from anima_fast.adapters.parts import Part
from anima_fast.data.batches import PADDED_ROWS
from anima_fast.data.encode_models import free_memory
from anima_fast.errors import UserError
from anima_fast.files import atomic_write
from anima_fast.memory.offload import install_block_runner
from anima_fast.models.dit import AnimaDiT, load_dit
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.models.model_files import check_model_files
from anima_fast.models.vae import SCALE, load_vae
from anima_fast.pictures import describe, save_png, to_image, unescape
from anima_fast.training.checks import choose_device, uses_fused_blocks
from anima_fast.training.flow import inference_sigmas
from anima_fast.training.progress import Progress

if TYPE_CHECKING:
    from anima_fast.options import SampleOptions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file that has been read, and the weight to use it at."""

    path: Path
    weight: float
    parts: dict[str, Part]

    @classmethod
    def read(cls, path: str | Path, weight: float = 1.0) -> LoRAFile:
        """Read a file of any dialect; raises `UserError` when it is no LoRA of this model."""
        return cls(Path(path), weight, read_lora(path)[0])


@torch.no_grad()
def euler_sample(
    dit: AnimaDiT,
    noise: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    steps: int,
    shift: float,
    guidance: float = 1.0,
    zero_keys: int | None = None,
    negative_zero_keys: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents that the flow leads to.

    Args:
        dit: the model `(x, sigma [B], context, zero_keys=) -> velocity`.
        noise: [B, 16, H, W] or [B, 16, 1, H, W]; the start, on any device.
        positive, negative: contexts [B, S, C]; `negative` is needed when guidance is not 1.
        steps, shift: of the schedule.
        guidance: g of the module docstring.
        zero_keys, negative_zero_keys: zero text rows beyond each context, see `AnimaDiT.forward`.
        on_step: called with the number of finished steps.

    Returns:
        Normalised latents of the noise's shape, float32, on the device of the context.

    Raises:
        ValueError: guidance without a negative context.
    """
    if guidance != 1 and negative is None:
        raise ValueError(f"guidance {guidance} needs a negative context")
    x = noise.to(positive.device, torch.float32)
    sigmas = inference_sigmas(steps, shift).to(x.device)
    for i in range(steps):
        sigma = sigmas[i].expand(len(x))
        velocity = dit(x, sigma, positive, zero_keys=zero_keys).float()
        if guidance != 1:
            opposite = dit(x, sigma, negative, zero_keys=negative_zero_keys).float()
            velocity = opposite + guidance * (velocity - opposite)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
        if on_step is not None:
            on_step(i + 1)
    return x


def start_noise(seed: int, width: int, height: int) -> Tensor:
    """Noise [1, 16, 1, H/8, W/8] float32 of a picture in pixels, drawn on the CPU from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, LATENT_CHANNELS, 1, height // SCALE, width // SCALE, generator=generator)


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    options: SampleOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    loras: Sequence[LoRAFile] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[Tensor]:
    """Text context [1, S, C] of each prompt, on the device; S differs, padding is left out.

    Loads the tokenizers, the text encoder and the LLM adapter of `options`, with the parts of the
    LoRA files that belong to them, and frees them. Prompts beyond 512 tokens are cut off as in
    training, and `say` is told. Raises `UserError` for missing or wrong files.
    """
    from anima_fast.models.text_encoder import load_text_encoder
    from anima_fast.models.tokenizers import load_tokenizers

    tokenizers = load_tokenizers(
        options.qwen3,
        qwen3_tokenizer_path=options.qwen3_tokenizer_path,
        t5_tokenizer_path=options.t5_tokenizer_path,
        models_dir=options.models_dir,
    )
    longest = max(*tokenizers.qwen_lengths(prompts), *tokenizers.t5_lengths(prompts))
    if longest > PADDED_ROWS:
        say(f"a prompt has {longest} tokens: what comes after the first {PADDED_ROWS} is cut off")
    encoder = load_text_encoder(options.qwen3, device=device, dtype=dtype)
    adapter = load_llm_adapter(options.llm_adapter_path or options.dit, device=device, dtype=dtype)
    for lora in loras:
        attach_lora(lora, text_encoder=encoder, llm_adapter=adapter)
    contexts = []
    for prompt in prompts:
        # One prompt at a time has no padding, so every row is a real one.
        tokens = tokenizers.encode([prompt])
        qwen_mask, t5_mask = tokens.qwen_mask.to(device), tokens.t5_mask.to(device)
        states = encoder(tokens.qwen_ids.to(device), qwen_mask)
        contexts.append(adapter(tokens.t5_ids.to(device), t5_mask, states, qwen_mask))
    return contexts


def attach_lora(
    lora: LoRAFile,
    *,
    dit: AnimaDiT | None = None,
    llm_adapter: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
) -> LoRANetwork | None:
    """Let models compute with the parts of a LoRA file that belong to them.

    Returns the network, or None when the file has no part for the models given. Raises `UserError`
    when such a part has no module, or one of another size.
    """
    owners = {names.TEXT_ENCODER: text_encoder, names.ADAPTER: llm_adapter, "": dit}
    parts = {n: p for n, p in lora.parts.items() if owners[_owner(n)] is not None}
    if not parts:
        return None
    example = next(model for model in owners.values() if model is not None)
    weight = next(example.parameters())
    plain = all(part.network == "LoRA" for part in parts.values())
    try:
        network = add_lora(
            dit,
            train_dit=dit is not None,
            llm_adapter=llm_adapter,
            text_encoder=text_encoder,
            modules_from=parts,
            # Products of LoHa and LoKr and norms of DoRA are taken of what was trained.
            dtype=weight.dtype if plain else torch.float32,
        )
    except UserError as error:
        raise UserError(f"{lora.path}: {error}") from None
    network.multiplier = lora.weight
    return network.to(weight.device).eval()


def _owner(name: str) -> str:
    return next((p for p in (names.TEXT_ENCODER, names.ADAPTER) if name.startswith(p)), "")


def run_sample(options: SampleOptions, *, quiet: bool = False) -> Path:
    """Render one picture and write it as PNG; the whole of `anima-fast sample`.

    Args:
        options: model files, prompt, seed, size and so on.
        quiet: no messages and no progress.

    Returns:
        The file, whose text chunk `parameters` says how it was made.

    Raises:
        UserError: missing or wrong files, a LoRA that does not fit, no memory, a folder that
            cannot be written, or numbers that are not finite.
    """
    output = _check_files(options)
    device, dtype = choose_device(options), DTYPES[options.dtype]
    loras = [LoRAFile.read(path, weight) for path, weight in options.loras]
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    with Progress() as progress, torch.no_grad():
        say = (lambda text: None) if quiet else progress.say
        latents = _sample_latents(options, seed, loras, device, dtype, say, progress, quiet)
        say("decoding")
        with _enough_memory("use a smaller --vae_chunk_size, such as 64"):
            # In half precision flat areas of the decoded picture show steps.
            vae = load_vae(options.vae, device=device, dtype=torch.float32)
            pixels = vae.decode(latents, chunk_rows=options.vae_chunk_size)
        save_png(output, to_image(pixels[0]), describe(options, seed))
        say(f"wrote {output}")
    return output


def _check_files(options: SampleOptions) -> Path:
    """Refuse missing model files and a useless output path now, not after the last step."""
    check_model_files(options)
    output = Path(options.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"--output {output}: give the name of a .png file")
    probe = output.with_name(".write_test")
    with atomic_write(probe) as file:
        file.write(b"ok")
    probe.unlink()
    return output


def _sample_latents(
    options: SampleOptions,
    seed: int,
    loras: Sequence[LoRAFile],
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
    progress: Progress,
    quiet: bool,
) -> Tensor:
    """Text phase and sampling phase; returns latents [1, 16, h, w] float32."""
    say("encoding the prompt")
    prompts = [unescape(options.prompt)]
    if options.cfg != 1:
        prompts.append(unescape(options.negative_prompt))
    contexts = encode_prompts(prompts, options, device=device, dtype=dtype, loras=loras, say=say)
    free_memory(device, keep_cached=False)
    say("loading the DiT")
    dit = load_dit(options.dit, device=device, dtype=dtype, attn_mode=options.attn_mode)
    for lora in loras:
        attach_lora(lora, dit=dit)
    if uses_fused_blocks(options, device):
        install_block_runner(dit, fused=True)
    zero_keys = [max(0, PADDED_ROWS - context.shape[1]) for context in contexts]
    say(f"sampling, seed {seed}")
    if not quiet:
        progress.start(0, options.steps)
    with _enough_memory("use a smaller --width and --height"):
        latents = euler_sample(
            dit,
            start_noise(seed, options.width, options.height),
            contexts[0],
            contexts[1] if len(contexts) > 1 else None,
            steps=options.steps,
            shift=options.shift,
            guidance=options.cfg,
            zero_keys=zero_keys[0],
            negative_zero_keys=zero_keys[-1],
            on_step=None if quiet else _stepper(progress),
        )
    if not torch.isfinite(latents).all():
        raise UserError(
            f"the sampled latents are not finite with --dtype {options.dtype}: use --dtype bf16 or "
            "fp32, or a smaller --cfg or LoRA weight"
        )
    del dit
    free_memory(device, keep_cached=False)
    return latents.squeeze(2)


def _stepper(progress: Progress) -> Callable[[int], None]:
    """Shows each finished step with the seconds that it took."""
    last = time.perf_counter()

    def step(done: int) -> None:
        nonlocal last
        now = time.perf_counter()
        progress.step({"step": done, "step_s": now - last})
        last = now

    return step


@contextmanager
def _enough_memory(remedy: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {remedy}") from error
