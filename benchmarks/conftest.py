"""Without a card nothing is timed: each entry runs once, kernels in Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before anything imports triton.
if not torch.cuda.is_available():
    from anima_fast.bench import interpreter

    interpreter.start()


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available():
        config.option.benchmark_disable = True
