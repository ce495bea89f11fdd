"""Which products of kernels with short sums became which tensor-core instruction, as JSON.

    python tests/short_sums_code.py [block] ARCH...

In a process of its own, as kernels are compiled: for each variant of the product and the attention
kernels its name, SHORT_SUMS, registers and spills, and multiply-adds by the type of their sums, as
multiples of one product of its tile. With `block` the variants of the fused block too.
"""

import json
import re
import sys
from collections import Counter

import torch

from anima_fast.bench import sass
from anima_fast.bench.dry import dry_launches, run_op
from anima_fast.bench.fused_block import FUSED_BLOCK_SHORT
from anima_fast.bench.resources import describe
from anima_fast.kernels.registry import OPS

# HMMA.16816 is of one warp, HGMMA.64x128x16 (capability 9.0) of four; both name their sums' type.
NAMED = re.compile(r"(HMMA\.16816|HGMMA\.(\d+)x(\d+)x(\d+))\.(F16|F32).*")
# UTCHMMA (10.0) does not: a descriptor says type and size, a constant in the PTX. Its layout is in
# the PTX ISA, "Instruction descriptor": from bit 4 the type of sums, from bit 17 columns / 8, from
# bit 24 rows / 16.
TCGEN05 = re.compile(r"tcgen05\.mma\S+ \[[^]]*\], [^,]+, [^,]+, (%r\d+),")
CONSTANT = re.compile(r"mov\.b32\s+(%r\d+), (\d+);")
LABELS = ("down", "self", "even triton")


def sums_of(asm, warps):
    """Multiply-adds of a compiled kernel's products by the type of their sums."""
    found = Counter()
    names = sass.INSTRUCTION.findall(sass.disassemble(asm["cubin"]))
    for name in names:
        if match := NAMED.fullmatch(name):
            m, n, k = (int(size) for size in match.groups()[1:4]) if match[2] else (16, 8, 16)
            found[match[5]] += m * n * k * warps // (4 if match[2] else 1)
    constants = dict(CONSTANT.findall(asm["ptx"]))
    described = [int(constants[register]) for register in TCGEN05.findall(asm["ptx"])]
    for bits in described:
        rows, columns = 16 * (bits >> 24 & 31), 8 * (bits >> 17 & 63)
        found[{0: "F16", 1: "F32"}[bits >> 4 & 3]] += rows * columns * 16
    unnamed = [n for n in names if re.search("[A-Z]MMA", n) and not NAMED.fullmatch(n)]
    # Those of the descriptors and no other.
    assert {"UTCHMMA"} >= {n.partition(".")[0] for n in unnamed} and len(unnamed) == len(described)
    return found


def variants(arch, block):
    with dry_launches(arch) as launches:
        blocks = [FUSED_BLOCK_SHORT] if block else []
        for op in (OPS["lora_linear_short"], OPS["attention_short"], *blocks):
            found = op.real_shapes(1024)
            for label in LABELS:
                if label in found:
                    run_op(op, found[label], torch.float16)
    for launch in {id(one.compiled): one for one in launches}.values():
        kernel = describe(launch, "", arch, "float16")
        constants = dict(word.split("=") for word in kernel.config.split())
        if "SHORT_SUMS" not in constants:
            continue
        rows, columns = int(constants["BLOCK_M"]), int(constants["BLOCK_N"])
        one = rows * columns * int(constants["BLOCK_K"])
        found = sums_of(launch.compiled.asm, kernel.warps)
        yield {
            "kernel": kernel.kernel,
            "arch": arch,
            "short": int(constants["SHORT_SUMS"]),
            "adapter": int(constants.get("HAS_ADAPTER", 0)),
            "narrow": min(rows, columns),
            "registers": kernel.registers,
            "spills": kernel.spill_bytes,
            "sums": {kind: n / one for kind, n in found.items()},
        }


if __name__ == "__main__":
    block, archs = "block" in sys.argv, [int(word) for word in sys.argv[1:] if word.isdecimal()]
    print(json.dumps([row for arch in archs for row in variants(arch, block)]))
