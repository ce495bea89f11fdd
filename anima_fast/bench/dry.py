"""Dry launches: every kernel that an op would launch is compiled for a card that is not there.

Ops run on tensors without memory (the meta device), so real sizes cost nothing and torch code
around the launches computes nothing. A stand-in driver names the target; `JITFunction.run` compiles
and hands the compiled kernel over instead of launching it. Configurations that an op chooses by
card or by size are thus the real ones.

Nothing here works under `TRITON_INTERPRET=1`, which replaces kernels by Python.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from anima_fast.bench.interpreter import interpreting
from anima_fast.bench.parity import leaves
from anima_fast.errors import UserError
from anima_fast.kernels import dispatch
from anima_fast.kernels.op import Op, Sizes

NAMESPACE = "anima_fast"
_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass(frozen=True)
class Launch:
    """One launch that did not happen: Triton's compiled kernel, and the grid it would have had."""

    compiled: Any
    grid: tuple[int, ...]


class StandInDriver:
    """What Triton asks a driver for while it compiles, answered for compute capability `arch`."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Compiled kernels are remembered per device: one device for each target.
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable:
        def benchmark(run: Callable, **_options: Any) -> list[float]:
            # Autotuning tries every configuration, so every one is compiled.
            run()
            return [1.0, 1.0, 1.0]

        return benchmark


class WithoutMemory(TorchDispatchMode):
    """Every tensor is made on the meta device, where our operators run their real code.

    The dispatcher would answer a meta tensor with an operator's fake kernel, which launches
    nothing.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == NAMESPACE:
            return func.redispatch(_CPU_KEY, *args, **kwargs)
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs["device"] = torch.device("meta")
        if func is torch.ops.aten.lift_fresh.default:
            # A literal, torch.tensor([...]).
            return torch.empty_like(args[0], device="meta")
        return func(*args, **kwargs)


@contextlib.contextmanager
def dry_launches(arch: int) -> Iterator[list[Launch]]:
    """Inside the block kernels are compiled for `arch` and collected, never launched.

    Raises `UserError` where kernels are interpreted.
    """
    if interpreting():
        raise UserError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    launches: list[Launch] = []
    run = JITFunction.run

    def collect(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        launches.append(Launch(compiled, tuple(int(size) for size in grid)))
        return compiled

    _forget_choices()
    JITFunction.run = collect
    driver.set_active(StandInDriver(arch))
    try:
        with dispatch.use("triton"):
            yield launches
    finally:
        JITFunction.run = run
        _forget_choices()
        try:
            driver.reset_active()
        except RuntimeError:
            # No card: Triton had no driver before either.
            driver._active = None


def _forget_choices() -> None:
    """Drop what kernel modules remember of the last card: tuned and cached configurations."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(f"{NAMESPACE}.kernels"):
            continue
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
            elif hasattr(value, "configs") and isinstance(getattr(value, "cache", None), dict):
                value.cache.clear()


def run_op(op: Op, sizes: Sizes, dtype: torch.dtype) -> None:
    """Call an op forward, and backward where it has gradients, on tensors without memory.

    Args:
        op: of `OPS`.
        sizes: one of its shapes.
        dtype: of its inputs.
    Raises:
        Whatever the op or the compiler raises.
    """
    with WithoutMemory():
        inputs = op.make_inputs(sizes, dtype, "meta")
        wanted: Sequence[torch.Tensor] = list(leaves(inputs, op.grads).values())
        for leaf in wanted:
            leaf.requires_grad_()
        outputs = op.function(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
        if wanted:
            gradients = [torch.empty_like(o) for o in outputs]
            torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
