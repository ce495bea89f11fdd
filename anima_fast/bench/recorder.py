"""Records every launch that code on tensors without memory would make on a card, and its memory.

A dispatch mode sees the operators of PyTorch, `dry.intercepted` the kernels of Triton. Each becomes
one `Launched`: by whom, bytes read and written, operations of a product. Bytes count each tensor
once, however often a kernel reads it: what must cross the memory bus at least. Of Triton's kernels
they follow from the compiled code (ttir.py), of PyTorch's operators from arguments and results.

Memory is counted by storages: one that an operator makes lives until nobody holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from anima_fast.bench.dry import Launch, WithoutMemory
from anima_fast.bench.ttir import accesses, has_product, touched

# Operators that return without a kernel, beside views.
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "_reshape_alias", "promote_types")
# Operators that a library computes; the rest is one kernel of PyTorch each, or two: a fill of the
# result and a copy into it.
CUBLAS = ("mm", "addmm", "bmm", "baddbmm")
FILL_AND_COPY = ("constant_pad_nd", "slice_backward", "select_backward")
# Operators that write their first argument without reading it.
OVERWRITES = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")
ATTENTION = "_scaled_dot_product_"
# Operations of our kernels that multiply matrices, from their arguments and grid: two for each
# multiplication and addition. The attention's backward has 4 and 3 products.
OPERATIONS: Mapping[str, Callable[[Mapping[str, Any], tuple[int, ...]], int]] = {
    "_gemm": lambda a, _: 2 * a["M"] * a["N"] * (a["K"] + a["R"] * a["HAS_ADAPTER"]),
    "_attention_fwd": lambda a, grid: 4 * _logits(a, grid),
    "_attention_bwd_dkdv": lambda a, grid: 8 * _logits(a, grid),
    "_attention_bwd_dq": lambda a, grid: 6 * _logits(a, grid),
}


def _logits(arguments: Mapping[str, Any], grid: tuple[int, ...]) -> int:
    return grid[1] * arguments["L"] * arguments["S"] * arguments["HEAD"]


@dataclass(frozen=True)
class Launched:
    """One launch.

    Attributes:
        name: who and what: "triton _gemm", "cublas mm", "flash forward", "torch add_".
        phase: fwd or bwd.
        read, written: bytes.
        operations: of a product or of attention.
    """

    name: str
    phase: str
    read: int
    written: int
    operations: int = 0


class Recorder(WithoutMemory):
    """Records what runs while it is the dispatch mode.

    Attributes:
        launches: in order.
        phase: of the launches to come.
        peak: the most bytes that storages made since `watch` held at once, beyond its floor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launched] = []
        self.phase = "fwd"
        self.peak = 0
        self._floor = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        # Storages that were there before: held, so that no new one gets their place.
        self._foreign: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        for x in given:
            self._know(x, self._foreign)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for x in _tensors(out):
            self._know(x, None)
        self.peak = max(self.peak, self.living() - self._floor)
        if has_kernel(func):
            found = _of_operator(func, args, kwargs or {}, out)
            self.launches += [replace(one, phase=self.phase) for one in found]
        return out

    def launched(self, launch: Launch) -> None:
        """Take a launch of Triton's; for `dry.intercepted`."""
        kernel, arguments = launch.compiled, launch.arguments
        read = written = 0
        for name, access in accesses(kernel.code, kernel.arguments).items():
            x = arguments[name]
            elements = touched(access, _elements(x), math.prod(launch.grid))
            read += elements[0] * x.itemsize
            written += elements[1] * x.itemsize
        count = OPERATIONS.get(kernel.name)
        if count is None and has_product(kernel.code):
            raise KeyError(f"{kernel.name} multiplies matrices: OPERATIONS must say how many")
        operations = count(arguments, launch.grid) if count else 0
        self.launches.append(
            Launched(f"triton {kernel.name}", self.phase, read, written, operations)
        )

    def living(self) -> int:
        """Bytes of the storages that were made and are still held."""
        self._made = {k: v for k, v in self._made.items() if not v[0].expired()}
        return sum(size for _, size in self._made.values())

    def watch(self) -> int:
        """Measure the peak from here on, above what lives now, whose bytes are returned."""
        self.peak, self._floor = 0, self.living()
        return self._floor

    def _know(self, x: Tensor, foreign: dict[int, StorageWeakRef] | None) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self._made or storage._cdata in self._foreign:
            return
        if foreign is not None:
            foreign[storage._cdata] = StorageWeakRef(storage)
        else:
            self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())


def has_kernel(func: Any) -> bool:
    """Whether an operator of PyTorch launches something on a card."""
    name = func.overloadpacket.__name__
    return func.namespace == "aten" and not func.is_view and not name.startswith(NO_KERNEL)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _elements(x: Tensor) -> int:
    """Elements of `x` that are not repetitions of others."""
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


def _bytes(tensors: Iterable[Any]) -> int:
    """Of tensors, each part of memory once."""
    parts = {
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x
        for x in tensors
        if isinstance(x, Tensor)
    }
    return sum(_elements(x) * x.itemsize for x in parts.values())


def _of_operator(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> Iterator[Launched]:
    """The launches of one operator of PyTorch."""
    name = func.overloadpacket.__name__
    if name.startswith(ATTENTION):
        operations = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        yield from _of_attention(name.removeprefix(ATTENTION), args, out, operations)
        return
    reads, writes = [], _tensors(out)
    for argument, value in zip(func._schema.arguments, args, strict=False):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            writes += _tensors(value)
        if not (changed and name in OVERWRITES):
            reads += _tensors(value)
    base = name.rstrip("_")
    if base in CUBLAS:
        if kwargs.get("beta", 1) == 0:
            # The product alone: what it would be added to is not read.
            reads = reads[1:]
        operations = 2 * out.numel() * reads[-1].shape[-2]
        yield Launched(f"cublas {base}", "", _bytes(reads), _bytes(writes), operations)
        return
    read, written = _bytes(reads), _bytes(writes)
    if name in FILL_AND_COPY:
        yield Launched(f"torch {name}", "", 0, written)
        written = min(read, written)
    yield Launched(f"torch {name}", "", read, written)


def _of_attention(name: str, args: Any, out: Any, operations: int) -> Iterator[Launched]:
    """Forward is one kernel; backward three where dq is summed in float32 over blocks of keys."""
    library, _, way = name.partition("_attention")
    if not way:
        yield Launched(f"{library} forward", "", _bytes(args), _bytes(out), operations)
    elif library == "efficient":
        yield Launched(f"{library} backward", "", _bytes(args), _bytes(out), operations)
    else:
        do, q, k, v, o, lse = args[:6]
        dq, dk, dv = out[:3]
        delta, sums = lse.numel() * 4, q.numel() * 4
        yield Launched(f"{library} backward delta", "", _bytes([do, o]), delta + sums)
        read = _bytes([do, q, k, v, lse]) + delta + sums
        yield Launched(f"{library} backward", "", read, _bytes([dk, dv]) + sums, operations)
        yield Launched(f"{library} backward dq", "", sums, _bytes([dq]))
