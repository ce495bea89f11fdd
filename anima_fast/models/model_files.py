"""Do the model files of a run exist, are they of the right kind, and do they fit each other?

Only headers are read, so that a wrong file is refused at once, not after the dataset is encoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import Checkpoint, detect_kind, wrong_kind
from anima_fast.models.dit import dit_tensors
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.llm_adapter import AdapterConfig, adapter_tensors
from anima_fast.models.text_encoder import read_sizes


def check_model_files(
    dit: str | None,
    qwen3: str | None,
    vae: str | None,
    llm_adapter: str | None = None,
    *,
    dit_option: str = "pretrained_model_name_or_path",
) -> DitConfig:
    """Refuse missing, wrong or mismatched files of the DiT, Qwen3, the VAE and the LLM adapter.

    The LLM adapter is in the DiT's file where it has none of its own. Returns the sizes of the DiT;
    raises `UserError` that names the option (`dit_option` for the DiT).
    """
    dit, qwen3, vae = (
        _existing(path, name) for path, name in ((dit, dit_option), (qwen3, "qwen3"), (vae, "vae"))
    )
    if llm_adapter:
        _existing(llm_adapter, "llm_adapter_path")
    base = Checkpoint.open(dit)
    sizes = DitConfig.from_shapes(dit_tensors(base).shapes)
    _check_text_path(Checkpoint.open(llm_adapter) if llm_adapter else base, qwen3, sizes)
    file = Checkpoint.open(vae)
    # An unknown kind may be a VAE with other names: loading it says what is missing.
    if detect_kind(file) not in ("vae", "unknown"):
        raise wrong_kind(file, "the Qwen-Image VAE that --vae needs")
    return sizes


def given(path: str | None, name: str) -> str:
    """The path of a required model file. Raises `UserError` when the option `name` is missing."""
    if not path:
        raise UserError(f"--{name} is required: give the path of that model file")
    return path


def _existing(path: str | None, name: str) -> str:
    path = given(path, name)
    if not Path(path).exists():
        raise UserError(f"--{name}: {path} does not exist; `anima-fast download` fetches it")
    return path


def check_lora_files(paths: Iterable[str | None]) -> None:
    """Refuse LoRA files that are missing or of another kind; None is passed over."""
    for path in filter(None, paths):
        checkpoint = Checkpoint.open(path)
        if detect_kind(checkpoint) != "lora":
            raise wrong_kind(checkpoint, "a LoRA")


def _check_text_path(holder: Checkpoint, qwen3: str, dit: DitConfig) -> None:
    """Refuse a file without an LLM adapter, or one that fits neither the DiT nor Qwen3."""
    tensors = adapter_tensors(holder)
    if tensors is None:
        raise UserError(
            f"{holder.name} holds no LLM adapter (llm_adapter.out_proj.weight): give the file that "
            "does with --llm_adapter_path"
        )
    adapter = AdapterConfig.from_shapes(tensors.shapes)
    if adapter.context_dim != dit.context_dim:
        raise UserError(
            f"{holder.name}: its LLM adapter gives {adapter.context_dim} numbers per token, the "
            f"DiT expects {dit.context_dim}: give files that belong together"
        )
    width = read_sizes(qwen3).hidden_size
    if width != adapter.source_width:
        raise UserError(
            f"--qwen3: {qwen3} has states of width {width}, the LLM adapter expects "
            f"{adapter.source_width}: Anima needs Qwen3-0.6B (base)"
        )
