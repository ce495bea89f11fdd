"""Every kernel against its definition: outputs and gradients, on whatever device is there.

For an op, a shape, a dtype and a memory layout three things run on the same rounded inputs: the
kernel, the reference in that dtype and the reference in float64. The kernel's relative error may be
twice the reference's plus a small floor; no other tolerance exists. An op with a yardstick (short
float16 sums) gets float32 inputs that each run rounds to its type, and may have half of the error
of the reference in the yardstick's type. Inputs and results lie between margins whose content must
come back unchanged, and results start as NaN, so that what a kernel reads or writes out of bounds,
or leaves out, shows. errors.py makes the rows of a run file of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.op import Op, Sizes

LAYOUTS = ("plain", "strided", "expanded")
HALF_FLOORS = {torch.float16: 2e-4, torch.bfloat16: 1e-3}
# Elements before and behind each guarded tensor, and what stands there.
MARGIN, CANARY = 64, 1234.0


@dataclass(frozen=True)
class Check:
    """One tensor of one run: `error` of the kernel, `reference_error`, and what was allowed."""

    op: str
    shape: str
    dtype: str
    layout: str
    tensor: str
    error: float
    reference_error: float
    allowed: float
    elements: int
    remark: str = ""

    @property
    def passed(self) -> bool:
        """Whether the kernel is right here."""
        return not self.remark and self.error <= self.allowed

    @property
    def case(self) -> str:
        """Shape and layout, as a part of a row is called."""
        return f"{self.shape} {self.layout}"

    def __str__(self) -> str:
        text = f"error {self.error:.2e}, allowed {self.allowed:.2e} {self.remark}".rstrip()
        return f"{self.op} {self.dtype} {self.shape} {self.layout} {self.tensor}: {text}"


def floor(dtype: torch.dtype, summed: int) -> float:
    """The error that is always allowed, for a result in `dtype` of sums of `summed` terms.

    A plain loop of additions of n random numbers ends with an error of about ε/4·√n, and a tensor
    of one element may have four roundings where the reference happens to have none. In float64 the
    reference is its own judge, so its error comes on top, and ours may be a few times as large.
    """
    if dtype in HALF_FLOORS:
        # Sums are float32; of the result alone a share is rounded the other way.
        return HALF_FLOORS[dtype]
    allowed = torch.finfo(dtype).eps * max(4.0, math.sqrt(summed) / 4)
    return 4 * allowed if dtype == torch.float64 else allowed


class Guard:
    """Allocates tensors between canaries, filled with NaN."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `kernels.dispatch.empty`."""
        dtype = dtype or like.dtype
        count = int(torch.Size(shape).numel())
        buffer = torch.full((count + 2 * MARGIN,), CANARY, device=like.device, dtype=dtype)
        self.buffers.append((buffer, count))
        inside = buffer[MARGIN : MARGIN + count]
        inside.fill_(float("nan") if dtype.is_floating_point else -(2**15))
        return inside.view(shape)

    def copy(self, x: Tensor) -> Tensor:
        """A guarded contiguous copy."""
        return self.empty(*x.shape, like=x).copy_(x)

    def intact(self) -> bool:
        """Whether every margin is as it was."""
        return all(
            bool((buffer[:MARGIN] == CANARY).all() and (buffer[MARGIN + n :] == CANARY).all())
            for buffer, n in self.buffers
        )


def lay_out(x: Tensor, layout: str, guard: Guard) -> Tensor:
    """`x` (or, expanded, its first row for all) in a guarded buffer of that memory layout."""
    if layout == "strided" and x.ndim >= 2:
        # The gaps are NaN: reading one instead of the next row shows. No two tensors have the same,
        # so that one's stride in the place of another's shows too.
        shape = (*x.shape[:-1], x.shape[-1] + 3 + len(guard.buffers))
        return guard.empty(*shape, like=x)[..., : x.shape[-1]].copy_(x)
    if layout == "expanded" and x.ndim >= 2:
        return guard.copy(x[:1]).expand(x.shape)
    return guard.copy(x)


def repeated(x: Tensor) -> Tensor:
    """A dense copy of what `lay_out` makes of `x` for the expanded layout."""
    return x[:1].expand(x.shape).contiguous() if x.ndim >= 2 else x


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every float tensor in it changed; lists are gone into."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return change(value)
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    return value


def rounded(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs with every float tensor in `dtype`."""
    return {name: map_tensors(value, lambda x: x.to(dtype)) for name, value in inputs.items()}


def leaves(inputs: dict[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors under `names`, those of lists as name[0], name[1], …"""
    found: dict[str, Tensor] = {}
    for name in names:
        value = inputs[name]
        items = {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {}
        found.update(items or {name: value})
    # The adapter of a layer that has none is empty.
    return {name: x for name, x in found.items() if x.numel()}


Values = dict[str, Tensor]


def run(
    function: Callable, inputs: dict[str, Any], names: Sequence[str], seed: int, layout: str
) -> tuple[Values, Guard]:
    """Outputs and gradients of one function on a guarded copy of `inputs`."""
    guard = Guard()
    inputs = {
        key: map_tensors(v, lambda x: lay_out(x, layout, guard).detach())
        for key, v in inputs.items()
    }
    wanted = leaves(inputs, names)
    for leaf in wanted.values():
        leaf.requires_grad_()
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = {f"out{i}" if len(outputs) > 1 else "out": o for i, o in enumerate(outputs)}
    if wanted:
        generator = torch.Generator().manual_seed(seed)
        upstream = []
        for out in outputs:
            noise = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            if layout in ("expanded", "copied"):
                one = torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape)
                upstream.append(one if layout == "expanded" else guard.copy(one))
                continue
            # Rounded to half precision: the same numbers for every dtype.
            noise = noise.bfloat16().to(out.dtype).to(out.device)
            upstream.append(lay_out(noise, layout, guard))
        gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream)
        values |= {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}
    return {k: v.detach() for k, v in values.items()}, guard


@contextlib.contextmanager
def guarded(guard_empty: Callable) -> Iterator[None]:
    """Inside the block kernels get their memory from `guard_empty`."""
    before, dispatch.empty = dispatch.empty, guard_empty
    try:
        yield
    finally:
        dispatch.empty = before


def relative_error(x: Tensor, exact: Tensor) -> float:
    """‖x − exact‖ / ‖exact‖ in float64; infinite where x is not finite."""
    difference = (x.double() - exact.double()).norm().item()
    scale = exact.double().norm().item()
    if not difference < float("inf"):
        return float("inf")
    return difference / scale if scale else difference


def check_op(
    op: Op,
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    layout: str = "plain",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Check]:
    """Compare an op with its definition at one shape; one `Check` per output and gradient."""
    torch.manual_seed(seed)
    given = op.make_inputs(sizes, torch.float32 if op.yardstick else dtype, device)
    exact_inputs = {k: map_tensors(v, Tensor.double) for k, v in given.items()}
    inputs = plain_inputs = given
    if op.yardstick:
        inputs, plain_inputs = (rounded(given, to) for to in (dtype, op.yardstick))
    # Where an option names a dtype, the exact run must not round either.
    exact_inputs |= {k: torch.float64 for k, v in inputs.items() if isinstance(v, torch.dtype)}
    margin_guard = Guard()
    with dispatch.use("triton"), guarded(margin_guard.empty), full_precision():
        kernel, guard = run(op.function, inputs, op.grads, seed, layout)
        if layout == "expanded":
            # Equal rows round equally, so nothing averages out and the rule below says little:
            # what matters is that the kernel does no worse than on a dense copy.
            dense = {k: map_tensors(v, repeated) for k, v in inputs.items()}
            copied, _ = run(op.function, dense, op.grads, seed, "copied")
    with full_precision():
        plain, _ = run(op.reference, plain_inputs, op.grads, seed, layout)
        exact, _ = run(op.reference, exact_inputs, op.grads, seed, layout)
    if kernel.keys() != exact.keys():
        raise ValueError(f"gives {', '.join(kernel)}, the definition {', '.join(exact)}")
    remark = "" if guard.intact() and margin_guard.intact() else "wrote out of bounds"
    checks = []
    for name, value in exact.items():
        own, reference = relative_error(kernel[name], value), relative_error(plain[name], value)
        wanted = dtype if op.yardstick else plain[name].dtype
        if kernel[name].dtype != wanted or kernel[name].shape != plain[name].shape:
            remark = f"is {kernel[name].dtype} {tuple(kernel[name].shape)}"
        allowed = 2 * reference + floor(kernel[name].dtype, op.summed(sizes))
        if op.yardstick:
            allowed = reference / 2
        if layout == "expanded":
            allowed = max(allowed, 1.001 * relative_error(copied[name], value))
        checks.append(
            Check(
                op=op.name,
                shape=" ".join(f"{k}={v}" for k, v in sizes.items()),
                dtype=str(dtype).removeprefix("torch."),
                layout=layout,
                tensor=name,
                error=own,
                reference_error=reference,
                allowed=allowed,
                elements=value.numel(),
                remark=remark,
            )
        )
    return checks


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside the block float32 products are not rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
