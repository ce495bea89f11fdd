"""Dry launches: every kernel that an op would launch is compiled for a card that is not there.

Ops run on tensors without memory (the meta device), so real sizes cost nothing and torch code
around the launches computes nothing. A stand-in driver names the target; `JITFunction.run` compiles
and hands the compiled kernel over instead of launching it. Configurations that an op chooses by
card or by size are thus the real ones. Who only asks what a kernel reads and writes stops at
Triton's intermediate code, which takes a tenth of the time.

Nothing here works under `TRITON_INTERPRET=1`, which replaces kernels by Python.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
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
    """One launch that did not happen.

    Attributes:
        compiled: Triton's compiled kernel, or `Intermediate`.
        grid: its programs.
        arguments: by name.
    """

    compiled: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Intermediate:
    """A kernel in Triton's intermediate code (TTIR), helpers inlined and constants folded.

    Attributes:
        arguments: those that are no constants, in the order of the code.
    """

    name: str
    code: str
    arguments: tuple[str, ...]


class StandInDriver:
    """What Triton asks a driver for while it compiles, answered for compute capability `arch`."""

    def __init__(self, arch: int, *, intermediate: bool = False) -> None:
        self.arch = arch
        # Compiled kernels are remembered per device: one device for each target and depth.
        self.device = -arch if intermediate else arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # There is no compiler here to hide from, and to import it takes seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == NAMESPACE:
            with self:
                return func.redispatch(_CPU_KEY, *args, **kwargs)
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs["device"] = torch.device("meta")
        if func is torch.ops.aten.lift_fresh.default:
            # A literal, torch.tensor([...]).
            return torch.empty_like(args[0], device="meta")
        return func(*args, **kwargs)


@contextlib.contextmanager
def dry_launches(arch: int) -> Iterator[list[Launch]]:
    """Inside the block every op runs its kernels: compiled for `arch`, collected, never launched.

    Raises `UserError` where kernels are interpreted.
    """
    launches: list[Launch] = []
    with intercepted(arch, launches.append), dispatch.use("triton"):
        yield launches


@contextlib.contextmanager
def intercepted(
    arch: int, receive: Callable[[Launch], None], *, intermediate: bool = False
) -> Iterator[None]:
    """Inside the block a launch is compiled for `arch` and received in place of being launched.

    Args:
        arch: compute capability, 89 for 8.9.
        receive: called with each launch.
        intermediate: stop at `Intermediate`.

    Raises:
        UserError: kernels are interpreted.
    """
    if interpreting():
        raise UserError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    run = JITFunction.run

    def compiled(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if not intermediate:
            return run(kernel, *args, warmup=True, **kwargs)
        # Asked for first, as that is when the kernel gets its compiler.
        kernel.device_caches[driver.active.get_current_device()]
        compiler, kernel.compile = kernel.compile, _intermediate
        try:
            return run(kernel, *args, warmup=True, **kwargs)
        finally:
            kernel.compile = compiler

    def collect(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compiled(self, *args, grid=grid, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        if callable(grid):
            grid = grid(arguments)
        receive(Launch(kernel, tuple(int(size) for size in grid), arguments))
        return kernel

    _forget_choices()
    JITFunction.run = collect
    driver.set_active(StandInDriver(arch, intermediate=intermediate))
    try:
        yield
    finally:
        JITFunction.run = run
        _forget_choices()
        try:
            driver.reset_active()
        except RuntimeError:
            # No card: Triton had no driver before either.
            driver._active = None


def _intermediate(source: Any, *, target: GPUTarget, options: Any, **_: Any) -> Intermediate:
    """In place of `triton.compile`: its first stage."""
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(parsed)
    module = source.make_ir(target, parsed, implementation, backend.get_module_map(), context)
    stages: dict[str, Callable] = {}
    backend.add_stages(stages, parsed, source.language)
    code = str(stages["ttir"](module, {}))
    names = tuple(name for name, kind in source.signature.items() if kind != "constexpr")
    return Intermediate(source.name, code, names)


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
