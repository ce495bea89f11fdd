"""Registers, spills, shared memory and occupancy of every kernel, per card, without a card.

Each op of the registry is launched dry (`dry.py`) at its real sizes, forward and backward, for each
compute capability; every kernel variant that this compiles becomes one `Resources`. `check` says
what is wrong with it: spilled registers cost memory traffic inside the inner loop, and a block that
wants more shared memory than the card has fails at launch.

Occupancy is the share of a multiprocessor's warps that resident blocks of the kernel can hold. It
follows from registers, shared memory and warps alone; the rules and limits are those of the CUDA
programming guide, "Compute Capabilities", tables of technical specifications, and of the occupancy
calculator in Nsight Compute (register allocation in units of 256 a warp, warps in groups of four).
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anima_fast.bench.cases import case_text, implementations, real_cases
from anima_fast.bench.choice import Choice, name_of
from anima_fast.bench.dry import Launch, dry_launches, run_op
from anima_fast.bench.fused_block import FUSED_BLOCK, FUSED_BLOCK_SHORT, in_chains_of
from anima_fast.bench.metrics import METRICS
from anima_fast.bench.run_file import Measurement
from anima_fast.errors import UserError
from anima_fast.kernels.dispatch import SHARED_KIB
from anima_fast.kernels.op import Op
from anima_fast.kernels.registry import OPS
from anima_fast.kernels.sums import CHAINS

ARCHS = (80, 86, 89, 90, 100, 120)
TOKENS = (1024, 2304, 4096, 9216)
# Sizes change what is compiled in few ways: divisibility by 16 and the tiles an op chooses. All of
# them are tried for one capability (this one when asked for), two for the others, and float32, a
# test type, at one.
FULL_ARCH, FEW_TOKENS, WIDE_TOKENS = 89, (1024, 4096), (4096,)

REGISTERS_PER_SM, MAX_REGISTERS, REGISTER_UNIT, WARP_GROUP = 65536, 255, 256, 4
# Shared memory is handed out in units of 128 bytes; the system keeps 1 KiB of it per block.
SHARED_UNIT, SHARED_RESERVED = 128, 1024
# Columns of tensor memory per multiprocessor, compute capability 10.0.
TENSOR_COLUMNS = 512
MAX_GRID_Y = 65535

# What is compiled: every op by itself, and the variants that run inside the fused block.
BLOCKS: dict[str, Op] = {op.name: op for op in (FUSED_BLOCK, FUSED_BLOCK_SHORT)}
COMPILED: dict[str, Op] = {**OPS, **BLOCKS}
# Those that a card takes which rounds float16 sums badly; `bench run` leaves them out.
_SHORTER = [
    in_chains_of(op, min(filter(None, CHAINS)))
    for op in (OPS["lora_linear_short"], OPS["attention_short"], FUSED_BLOCK_SHORT)
]
SHORTER: dict[str, Op] = {op.name: op for op in _SHORTER}


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds at once: warps, blocks, shared memory in KiB."""

    warps: int
    blocks: int
    shared_kib: int


LIMITS = {
    75: Limits(32, 16, 64),
    80: Limits(64, 32, 164),
    86: Limits(48, 16, 100),
    87: Limits(48, 16, 164),
    89: Limits(48, 24, 100),
    90: Limits(64, 32, 228),
    100: Limits(64, 32, 228),
    103: Limits(64, 32, 228),
    120: Limits(48, 24, 100),
}


@dataclass(frozen=True)
class Resources:
    """One kernel variant on one card.

    Attributes:
        op, kernel: where it was launched, and its name; kernel is empty when an op did not compile.
        arch: compute capability, 89 for 8.9.
        dtype: of the op's inputs.
        config: its constants, without floats and types.
        registers: per thread.
        spill_bytes: of local memory per thread.
        shared_bytes: per block.
        tensor_columns: of tensor memory, per block.
        warps, stages: per block, of the software pipeline.
        grid: the largest that was asked for.
        occupancy: share of the warps of a multiprocessor, 0 to 1.
        error: why it did not compile.
    """

    op: str
    kernel: str
    arch: int
    dtype: str
    config: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    tensor_columns: int = 0
    warps: int = 0
    stages: int = 0
    grid: tuple[int, ...] = ()
    occupancy: float = 0.0
    error: str = ""

    @property
    def problems(self) -> list[str]:
        """What is wrong with it, in words; empty when nothing is."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes a thread")
        limit = SHARED_KIB[self.arch] * 1024
        if self.shared_bytes > limit:
            found.append(f"wants {self.shared_bytes} bytes of shared memory of {limit}")
        if self.registers > MAX_REGISTERS:
            found.append(f"wants {self.registers} registers of {MAX_REGISTERS}")
        if self.tensor_columns > TENSOR_COLUMNS:
            found.append(f"wants {self.tensor_columns} tensor columns of {TENSOR_COLUMNS}")
        if max(self.grid[1:], default=0) > MAX_GRID_Y:
            found.append(f"has a grid of {self.grid}: beyond {MAX_GRID_Y} in y or z")
        if not found and not self.occupancy:
            found.append("does not fit a multiprocessor")
        return found


def occupancy(
    arch: int, *, registers: int, warps: int, shared_bytes: int, tensor_columns: int = 0
) -> float:
    """Share of a multiprocessor's warps that blocks of a kernel can fill, 0 to 1.

    Args:
        arch: a key of `LIMITS`.
        registers: per thread.
        warps: per block.
        shared_bytes: per block, without what the system keeps.
        tensor_columns: of tensor memory, per block.
    """
    limits = LIMITS[arch]
    per_warp = math.ceil(max(registers, 1) * 32 / REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS_PER_SM // per_warp // WARP_GROUP * WARP_GROUP
    shared = math.ceil(shared_bytes / SHARED_UNIT) * SHARED_UNIT
    # Turing keeps none.
    shared += SHARED_RESERVED if arch >= 80 else 0
    blocks = min(limits.blocks, limits.warps // warps, warps_by_registers // warps)
    if shared:
        blocks = min(blocks, limits.shared_kib * 1024 // shared)
    if tensor_columns:
        blocks = min(blocks, TENSOR_COLUMNS // tensor_columns)
    return blocks * warps / limits.warps


def measure(
    *,
    ops: Mapping[str, Op] = COMPILED,
    archs: Sequence[int] = ARCHS,
    dtypes: Collection[torch.dtype] | None = None,
    quick: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> list[Resources]:
    """Compile what `ops` launch on each of `archs`; one row per op, kernel variant and card.

    Args:
        ops: by name.
        archs: compute capabilities, keys of `LIMITS`.
        dtypes: the types to try of those that an op lists; all when None.
        quick: try types other than bfloat16 for one capability only; the others differ little.
        sizes: the model's shapes with these sizes alone, as `--case` gives them.

    Raises:
        UserError: kernels are interpreted, or a tool of Triton is missing.
    """
    full = FULL_ARCH if FULL_ARCH in archs else archs[0]
    rows: list[Resources] = []
    for arch in archs:
        # Triton reports failures of its assembler on stdout, where JSON goes.
        with contextlib.redirect_stdout(sys.stderr), dry_launches(arch) as launches:
            for op in ops.values():
                wanted = [d for d in op.dtypes if dtypes is None or d in dtypes]
                plan = {dtype: tokens_for(dtype, wanted, arch == full, quick) for dtype in wanted}
                rows += _rows_of(op, arch, plan, launches, sizes or {})
    return rows


def tokens_for(
    dtype: torch.dtype, dtypes: Collection[torch.dtype], full: bool, quick: bool
) -> tuple[int, ...]:
    """Image sizes, in tokens, to try for one of an op's `dtypes`; `full` on one capability."""
    main = torch.bfloat16 if torch.bfloat16 in dtypes else next(iter(dtypes))
    if quick and dtype != main:
        return WIDE_TOKENS if full else ()
    if dtype == torch.float32:
        return WIDE_TOKENS
    return TOKENS if full else FEW_TOKENS


def _rows_of(
    op: Op, arch: int, plan: Mapping[torch.dtype, tuple[int, ...]], launches: list[Launch],
    given: Mapping[str, int],
) -> Iterable[Resources]:  # fmt: skip
    rows: dict[Any, Resources] = {}
    for dtype, tokens in plan.items():
        name = name_of(dtype)
        for label, sizes in real_cases(op, given, [given["L"]] if "L" in given else tokens):
            launches.clear()
            try:
                run_op(op, sizes, dtype)
            except Exception as error:
                what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                where = case_text(label, sizes)
                rows.setdefault(
                    f"error {what}", Resources(op.name, "", arch, name, config=where, error=what)
                )
            for launch in launches:
                known = rows.get(id(launch.compiled))
                if known is None:
                    known = describe(launch, op.name, arch, name)
                grid = max(known.grid, launch.grid, key=math.prod)
                rows[id(launch.compiled)] = replace(known, grid=grid)
    return rows.values()


def describe(launch: Launch, op: str, arch: int, dtype: str) -> Resources:
    """The resources of a compiled kernel that `op` would have launched on `arch`."""
    compiled, metadata = launch.compiled, launch.compiled.metadata
    registers, spilled = _used(compiled.asm["cubin"])
    columns = getattr(metadata, "tmem_size", 0) or 0
    return Resources(
        op=op,
        kernel=metadata.name,
        arch=arch,
        dtype=dtype,
        config=" ".join(_constants(compiled.src)),
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=metadata.shared,
        tensor_columns=columns,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        grid=launch.grid,
        occupancy=occupancy(
            arch,
            registers=registers,
            warps=metadata.num_warps,
            shared_bytes=metadata.shared,
            tensor_columns=columns,
        ),
    )


def _constants(source: Any) -> Iterator[str]:
    declared = {parameter.name for parameter in source.fn.params if parameter.is_constexpr}
    for path, value in source.constants.items():
        name = source.fn.arg_names[path[0]] if isinstance(path, tuple) else str(path)
        if name in declared and isinstance(value, (bool, int, str)):
            yield f"{name}={int(value) if isinstance(value, bool) else value}"


# The fused block launches what its ops launch.
@functools.cache
def _used(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, from the assembled kernel."""
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise UserError(f"Triton's cuobjdump is missing ({error}): reinstall triton") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump said {done.stdout!r} {done.stderr!r}")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


def check(rows: Iterable[Resources]) -> list[str]:
    """One line per problem of any row; empty when all kernels may ship."""
    return [
        " ".join(filter(None, (f"{row.op} sm_{row.arch} {row.dtype}", row.kernel, row.config)))
        + f": {problem}"
        for row in rows
        for problem in row.problems
    ]


def rows(choice: Choice) -> Iterator[list[Measurement]]:
    """For each op: registers, spills, shared memory and occupancy of each kernel on each card, the
    variants as parts.

    A quick choice compiles bfloat16 for one capability.
    """
    archs = choice.archs or ((FULL_ARCH,) if choice.quick else ARCHS)
    dtypes = [getattr(torch, name) for name in choice.dtypes] or None
    for name, op in COMPILED.items():
        if not choice.wants_op("block" if name in BLOCKS else name):
            continue
        if choice.quick and not choice.dtypes:
            dtypes = [torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]]
        for provider, one in implementations(op, choice).items():
            found = measure(
                ops={name: one}, archs=archs, dtypes=dtypes, quick=choice.quick, sizes=choice.sizes
            )
            some = _measurements(found, case_text("", choice.sizes))
            yield [replace(row, provider=provider) for row in some]


def _measurements(found: Iterable[Resources], sizes: str) -> Iterator[Measurement]:
    kernels: dict[tuple[str, ...], list[Resources]] = defaultdict(list)
    for one in found:
        kernels[one.op, one.kernel, f"sm_{one.arch}", one.dtype].append(one)
    for (op, kernel, arch, dtype), variants in kernels.items():
        case = f"{kernel} {sizes}".strip()
        row = Measurement(op, "registers", None, "registers", case, dtype, mode=arch,
                          source="compiler", note="; ".join(check(variants)))  # fmt: skip
        for metric, value, worst in (
            ("registers", "registers", max),
            ("spills", "spill_bytes", max),
            ("shared", "shared_bytes", max),
            ("occupancy", "occupancy", min),
        ):
            parts = {v.config: float(getattr(v, value)) for v in variants if not v.error}
            yield replace(row, metric=metric, unit=METRICS[metric].unit, parts=parts,
                          value=worst(parts.values(), default=None))  # fmt: skip
