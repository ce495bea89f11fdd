"""Machine instructions of compiled kernels, counted by what they do; no card is needed.

nvdisasm comes with Triton. Classes say what a kernel engineer looks for first: which tensor-core
instruction a product became, how wide loads are, whether copies to shared memory are asynchronous.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from anima_fast.bench.cases import chosen_cases, implementations, timed_dtypes
from anima_fast.bench.choice import Choice, name_of
from anima_fast.bench.dry import dry_launches, run_op
from anima_fast.bench.resources import BLOCKS, COMPILED, FULL_ARCH
from anima_fast.bench.run_file import Measurement
from anima_fast.errors import UserError

# "/*00a0*/  @!P0 LDG.E.128 R4, ..." → LDG.E.128
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
# In this order: the first that fits names the class, with the groups that it captures.
CLASSES = (
    # HMMA.16816.F32.BF16: half operands; IMMA integer, QMMA 8-bit floats, HGMMA of sm_90, UTCHMMA
    # of sm_100. The type is that of the sums.
    (r"((?:UTC)?[HIQDO]G?MMA)(?:\.SP)?(?:\.[\dx]+)?(?:\.(F16|F32))?.*", "{0} {1}"),
    (r"LDGSTS(?:\.\w+)*?\.(64|128)(?:\..*)?", "asynchronous copy {0}"),
    (r"LDGSTS.*", "asynchronous copy 32 or less"),
    (r"UTMA\w*|UBLKCP.*", "bulk copy"),
    (r"LDG\.E(?:\.\w+)*?\.(64|128)(?:\..*)?", "load {0}"),
    (r"LDG.*", "load 32 or less"),
    (r"STG\.E(?:\.\w+)*?\.(64|128)(?:\..*)?", "store {0}"),
    (r"STG.*", "store 32 or less"),
    (r"LDL.*|STL.*", "local memory"),
    (r"LDSM.*", "shared load, matrix"),
    (r"LDS.*", "shared load"),
    (r"STS.*|STSM.*", "shared store"),
    (r"RED.*|ATOM.*", "atomic"),
    (r"BAR.*", "barrier"),
    (r"LDGDEPBAR|DEPBAR.*", "wait for copies"),
    (r"SHFL.*|REDUX.*", "between lanes"),
    (r"MUFU.*", "special function"),
    (r"[FDH](?:FMA|ADD|MUL|FMA2|ADD2|MUL2)\w*(?:\..*)?", "float arithmetic"),
    (r"F2F.*|F2I.*|I2F.*|F2FP.*|I2FP.*", "conversion"),
    (r".*", "other"),
)
_CLASSES = tuple((re.compile(pattern), name) for pattern, name in CLASSES)


def class_of(instruction: str) -> str:
    """The class of an instruction such as "LDG.E.128"."""
    for pattern, name in _CLASSES:
        if found := pattern.fullmatch(instruction):
            return name.format(*(group or "" for group in found.groups())).strip()
    raise AssertionError("the last pattern fits everything")


def counts(text: str) -> Counter[str]:
    """Instructions of a disassembly by class, without padding."""
    found = (name for name in INSTRUCTION.findall(text) if name.partition(".")[0] != "NOP")
    return Counter(map(class_of, found))


def disassemble(cubin: bytes) -> str:
    """The machine code of a compiled kernel as text. Raises `UserError` without nvdisasm."""
    from triton import knobs

    try:
        tool = knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        raise UserError(f"Triton's nvdisasm is missing ({error}): reinstall triton") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        # Without the analysis of jumps, which takes half of the time and changes no instruction.
        done = subprocess.run([tool, "-ndf", "-c", file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm said {done.stderr!r}")
    return done.stdout


def rows(choice: Choice) -> Iterator[list[Measurement]]:
    """For each op, shape, dtype and capability: the instructions of each kernel, by class."""
    for arch in choice.archs or (FULL_ARCH,):
        with dry_launches(arch) as launches:
            for name, op in COMPILED.items():
                if not choice.wants_op("block" if name in BLOCKS else name):
                    continue
                for dtype in timed_dtypes(op, choice):
                    some = list(chosen_cases(op, choice))[: None if choice.sizes else 4]
                    for provider, one in implementations(op, choice).items():
                        launches.clear()
                        for _, sizes in some:
                            run_op(one, sizes, dtype)
                        found = _kernel_rows(launches, name, arch, dtype)
                        yield [replace(row, provider=provider) for row in found]


def _kernel_rows(launches: list, op: str, arch: int, dtype: torch.dtype) -> Iterator[Measurement]:
    kernels: dict[str, list[Counter[str]]] = {}
    for compiled in {id(launch.compiled): launch.compiled for launch in launches}.values():
        found = counts(disassemble(compiled.asm["cubin"]))
        kernels.setdefault(compiled.metadata.name, []).append(found)
    for kernel, variants in kernels.items():
        # The longest variant stands for a kernel: tails of odd sizes are in it.
        longest = max(variants, key=lambda found: sum(found.values()))
        parts = {name: float(count) for name, count in sorted(longest.items())}
        note = f"the longest of {len(variants)} variants" if len(variants) > 1 else ""
        yield Measurement(
            op, "instructions", float(sum(longest.values())), "instructions", kernel,
            name_of(dtype), mode=f"sm_{arch}", parts=parts, source="compiler",
            note=note,
        )  # fmt: skip
