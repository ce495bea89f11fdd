"""From prompts to pictures; `run_sample` is all of `anima-fast sample`.

Each model is loaded, used for all pictures and freed before the next: the VAE for a picture to
start from, text encoder and LLM adapter, DiT, VAE.
"""

from anima_fast.sampling.euler import euler_sample, start_noise
from anima_fast.sampling.loras import LoRAFile, attach_lora
from anima_fast.sampling.run import run_sample
from anima_fast.sampling.texts import encode_prompts

__all__ = [
    "LoRAFile", "attach_lora", "encode_prompts", "euler_sample", "run_sample", "start_noise",
]  # fmt: skip
