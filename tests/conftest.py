"""Settings for every test: one thread a process, no hub, a private cache folder, no leftovers."""

import os

# Two workers with two threads each on two cores wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch

try:
    import hypothesis
except ImportError:
    # A machine with a card may have little more than pytest: tests marked gpu need no more.
    hypothesis = None

# Before anything imports triton: without a card its kernels run interpreted, on the CPU.
if not torch.cuda.is_available():
    from anima_fast.bench import interpreter

    interpreter.start()

if hypothesis is not None:
    # Machines that run tests are shared: a slow example is no defect.
    hypothesis.settings.register_profile("shared", deadline=None)
    hypothesis.settings.load_profile("shared")


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory, monkeypatch):
    """Hash indexes and downloads of a test never land in the developer's home."""
    monkeypatch.setenv("ANIMA_FAST_HOME", str(tmp_path_factory.mktemp("home")))


def pytest_collection_modifyitems(items):
    """Tests that need a card are skipped, by name, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA card"))
