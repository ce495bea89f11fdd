"""Device, dtypes, backend switches, and whether the fused kernels run."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from anima_fast.errors import UserError

# The words for a precision, in the options, on the tools' command lines and in saved files.
DTYPES = {
    "no": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Held while a graph is recorded (models/block_graphs.py) and while any thread but the main one
# takes page-locked memory: CUDA aborts a recording when another thread allocates meanwhile.
NOT_WHILE_RECORDING = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block PyTorch computes on one thread.

    Small matrices gain nothing from more: on a busy machine, threads that waited for each other
    made a step five times slower. And sums have the same digits whatever the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_device(name: str | None) -> torch.device:
    """The device of --device; without one CUDA where there is a card, otherwise the CPU.

    Raises `UserError` for a device that does not exist here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "--device cuda needs a CUDA card and a CUDA build of PyTorch; this PyTorch sees none "
            "(`anima-fast doctor` says what is missing), or use --device cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown to PyTorch: use cuda or cpu") from None
    if device.type not in ("cuda", "cpu"):
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--device {name} cannot be used: {reason}; use --device cpu") from None
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: there are {torch.cuda.device_count()} cards, counted from cuda:0"
            )
        # Triton launches on the current card, whatever card its tensors are on.
        torch.cuda.set_device(device)
    return device


def set_backends(*, tf32: bool = False, benchmark: bool = False) -> None:
    """How float32 products and convolutions are computed on a card.

    By itself torch allows TF32 in convolutions, which the VAE of previews and `sample` consists of.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = benchmark


def uses_fused_blocks(kernels: str, device: torch.device, *, compiled: bool = False) -> bool:
    """Whether the DiT runs through the fused kernels on a device.

    `kernels` is auto, triton or eager; a `compiled` DiT takes the eager blocks. Raises `UserError`
    when triton is asked for and cannot run.
    """
    if kernels == "triton":
        check_triton("--kernels triton", "--kernels eager", device)
        return True
    if kernels == "eager" or compiled or device.type != "cuda":
        return False
    return importlib.util.find_spec("triton") is not None


def check_triton(option: str, remedy: str, device: torch.device | str | None = None) -> None:
    """Refuse Triton kernels where it is not installed, or off a CUDA card unless interpreted.

    `option` is what asked for them, `remedy` what to use instead, for the message.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError(f"{option} needs the package triton: pip install triton, or use {remedy}")
    off_card = device is not None and torch.device(device).type != "cuda"
    if off_card and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"{option} needs a CUDA card: use {remedy} here")


def check_torch_version(version: str = torch.__version__) -> None:
    """Refuse PyTorch below 2.5, whose attention gives NaN for fully masked rows."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (2, 5):
        raise UserError(
            f"PyTorch {version} is too old: before 2.5 its attention gives NaN (NaN loss, black "
            "images); pip install -U torch"
        )
