"""A compact single-GPU trainer for the Anima image model.

The names below are loaded on first use, so that importing the package (and with it the command
line's help) does not import torch:

    load_dit, load_llm_adapter, load_vae, load_text_encoder   the networks, from published files
    add_lora                                                  a LoRA network on a DiT
    train, TrainOptions                                       a whole training run
    UserError                                                 bad input, explained in one line
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_dit": "models.dit",
    "load_llm_adapter": "models.llm_adapter",
    "load_vae": "models.vae_checkpoint",
    "load_text_encoder": "models.text_encoder",
    "add_lora": "adapters.lora",
    "train": "training.loop",
    "TrainOptions": "options.run",
    "UserError": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'anima_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anima_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
