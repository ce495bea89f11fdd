"""The options of `anima-fast sample`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from anima_fast.errors import UserError
from anima_fast.options.data import ModelFiles
from anima_fast.options.declare import Checked, option
from anima_fast.options.rules import check_sums
from anima_fast.options.training import ATTN_MODES, DeviceOptions, SumsOptions
from anima_fast.options.words import path_and_weight

_sample = partial(option, "Image")
_sample_model = partial(option, "Model files")
_sample_speed = partial(option, "Memory and speed")


@dataclass(frozen=True)
class SampleOptions(Checked, SumsOptions, DeviceOptions, ModelFiles):
    """All options of `anima-fast sample`."""

    dit: str | None = _sample_model(None, "Anima DiT, one .safetensors file (required).")
    lora: tuple[str, ...] = _sample_model((), "LoRA files, each as path or path:weight.")
    lora_weight: float = _sample_model(1.0, "Weight of LoRA files given without one.")
    prompt: str = _sample("", "What to show; (words:1.3) weigh more, as in ComfyUI.")
    prompts: str | None = _sample(
        None, "File with prompts and their settings, as for --sample_prompts of train."
    )
    no_prompt_weights: bool = _sample(False, "Read parentheses as text, as training does.")
    count: int = _sample(1, "Pictures of each prompt, with seeds that follow each other.", low=1)
    batch_size: int = _sample(1, "Pictures made together, where only the seed differs.", low=1)
    init_image: str | None = _sample(None, "Picture to start from (image to image).")
    strength: float = _sample(
        1.0, "How far from init_image: 1 is from noise alone; ComfyUI's denoise.", low=0.01, high=1
    )
    grid: tuple[str, ...] = _sample(
        (), "One or two axes for a labelled grid: weight=0,0.5,1 seed=1,2,3; also weight1, steps, "
        "cfg, shift, strength, width, height, prompt=cat|dog, lora=a.safetensors,b.safetensors.",
    )  # fmt: skip
    negative_prompt: str = _sample("", "What to avoid; used when cfg is above 1.")
    seed: int | None = _sample(None, "Seed of the noise (default: drawn).", low=0, high=2**63 - 1)
    steps: int = _sample(30, "Euler steps.", low=1)
    cfg: float = _sample(4.0, "Guidance scale; 1 = off.", low=0)
    shift: float = _sample(3.0, "Shift of the schedule.", low=1e-6)
    width: int | None = _sample(
        None, "Width in pixels, a multiple of 16 (default: 1024, or that of init_image).",
        low=16, high=16384, multiple=16,
    )  # fmt: skip
    height: int | None = _sample(
        None, "Height in pixels, a multiple of 16 (default: 1024, or that of init_image).",
        low=16, high=16384, multiple=16,
    )  # fmt: skip
    output: str = _sample("sample.png", "PNG file to write, or a folder; several are numbered.")
    dtype: str = _sample_speed(
        "auto", "Type of weights and arithmetic; auto is what training takes here.",
        choices=("auto", "bf16", "fp16", "fp32"),
    )  # fmt: skip
    attn_mode: str = _sample_speed("torch", "Attention backend.", choices=ATTN_MODES)

    def _settle(self) -> None:
        if self.vae_chunk_size and self.vae_chunk_size % 2:
            self._put("vae_chunk_size", self.vae_chunk_size + 1)
        if self.strength != 1 and not self.init_image:
            raise UserError("--strength needs --init_image FILE: the picture to start from")
        check_sums(self.dtype, self.sums)
        _ = self.loras

    @property
    def loras(self) -> tuple[tuple[str, float], ...]:
        """(path, weight) of each LoRA file."""
        return tuple(path_and_weight(text, self.lora_weight) for text in self.lora)
