"""Golden vectors: small ones lie in tests/golden, larger sets may lie beside the checkout.

The vectors come from an independent implementation with random weights (fp32, CPU). A test that
asks for a file which is in neither place is skipped.
"""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

HERE = Path(__file__).parent


@functools.cache
def _folders() -> list[Path]:
    """tests/golden, `ANIMA_FAST_GOLDEN`, then any `golden` folder of a sibling of the checkout."""
    outside = sorted(HERE.parent.parent.glob("*/golden/README.md"))
    named = os.environ.get("ANIMA_FAST_GOLDEN")
    return [HERE / "golden", *([Path(named)] if named else []), *(p.parent for p in outside)]


def find(name: str) -> Path:
    """The golden file of that name; skips the test when there is none."""
    for folder in _folders():
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"golden file {name} is not at hand")


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a golden safetensors file, `config` parsed from JSON."""
    with safe_open(find(f"{name}.safetensors"), framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "config" in metadata:
        metadata["config"] = json.loads(metadata["config"])
    return tensors, metadata


def load_json(name: str) -> dict:
    """A golden JSON file."""
    return json.loads(find(f"{name}.json").read_text(encoding="utf-8"))


def tokenizers() -> Path:
    """The folder with `qwen3_06b` and `t5_old`; skips the test when it is not at hand."""
    for folder in _folders()[1:]:
        if (folder.parent / "tokenizers" / "qwen3_06b").exists():
            return folder.parent / "tokenizers"
    pytest.skip("the published tokenizer files are not at hand")


def weights(tensors: dict[str, torch.Tensor], prefix: str = "w.") -> dict[str, torch.Tensor]:
    """The `w.*` tensors as a float32 state dict."""
    return {k[len(prefix) :]: v.float() for k, v in tensors.items() if k.startswith(prefix)}
