"""Do the model files of a run exist, are they of the right kind, and do they fit each other?

Only headers are read, so a wrong file is refused at once and not after the dataset is encoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import Checkpoint, detect_kind, wrong_kind
from anima_fast.models.dit import dit_tensors
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.llm_adapter import AdapterConfig, adapter_tensors
from anima_fast.models.text_encoder import read_sizes

if TYPE_CHECKING:
    from anima_fast.options.run import TrainOptions
    from anima_fast.options.sample import SampleOptions


def check_model_files(options: TrainOptions | SampleOptions) -> DitConfig:
    """Refuse missing, wrong or mismatched files of the DiT, the LLM adapter, Qwen3 and the VAE.

    Returns the sizes of the DiT. Raises `UserError` that names the option.
    """
    dit_option = "dit" if hasattr(options, "dit") else "pretrained_model_name_or_path"
    for name in (dit_option, "qwen3", "vae", "llm_adapter_path"):
        path = getattr(options, name)
        if not path and name != "llm_adapter_path":
            raise UserError(f"--{name} is required: give the path of that model file")
        if path and not Path(path).exists():
            raise UserError(f"--{name}: {path} does not exist; `anima-fast download` fetches it")
    dit = Checkpoint.open(getattr(options, dit_option))
    sizes = DitConfig.from_shapes(dit_tensors(dit).shapes)
    _check_text_path(options, dit, sizes.context_dim)
    vae = Checkpoint.open(options.vae)
    # An unknown kind may be a VAE of another naming: loading it says what is missing.
    if detect_kind(vae) not in ("vae", "unknown"):
        raise wrong_kind(vae, "the Qwen-Image VAE that --vae needs")
    return sizes


def check_lora_files(options: TrainOptions) -> None:
    """Refuse `network_weights` and `base_weights` that are missing or of another kind."""
    for path in filter(None, (options.network_weights, *options.base_weights)):
        checkpoint = Checkpoint.open(path)
        if detect_kind(checkpoint) != "lora":
            raise wrong_kind(checkpoint, "a LoRA")


def _check_text_path(
    options: TrainOptions | SampleOptions, dit: Checkpoint, context_dim: int
) -> None:
    holder = Checkpoint.open(options.llm_adapter_path) if options.llm_adapter_path else dit
    tensors = adapter_tensors(holder)
    if tensors is None:
        raise UserError(
            f"{holder.name} holds no LLM adapter (llm_adapter.out_proj.weight): give the file that "
            "does with --llm_adapter_path"
        )
    adapter = AdapterConfig.from_shapes(tensors.shapes)
    if adapter.context_dim != context_dim:
        raise UserError(
            f"{holder.name}: its LLM adapter gives {adapter.context_dim} numbers per token, the "
            f"DiT expects {context_dim}: give files that belong together"
        )
    width = read_sizes(options.qwen3).hidden_size
    if width != adapter.source_width:
        raise UserError(
            f"--qwen3: {options.qwen3} has states of width {width}, the LLM adapter expects "
            f"{adapter.source_width}: Anima needs Qwen3-0.6B (base)"
        )
