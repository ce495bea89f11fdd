"""Which products of kernels with short sums became which tensor-core instruction, as JSON.

    python tests/short_sums_code.py [block] ARCH...

In a process of its own, as kernels are compiled: for each variant of the product and the attention
kernels its name, SHORT_SUMS, registers and spills, and instructions by the type of their sums, as
multiples of one product of its tile. With `block` the variants of the fused block too.
"""

import json
import sys

import torch

from anima_fast.bench import sass
from anima_fast.bench.dry import dry_launches, run_op
from anima_fast.bench.fused_block import FUSED_BLOCK_SHORT
from anima_fast.bench.resources import describe
from anima_fast.kernels.registry import OPS

# Terms, rows and columns of one HMMA.16816.
MULTIPLY_ADDS = 16 * 16 * 8


LABELS = ("down", "self", "even triton")


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
        found = sass.counts(sass.disassemble(launch.compiled.asm["cubin"]))
        rows, columns = int(constants["BLOCK_M"]), int(constants["BLOCK_N"])
        depth = int(constants["BLOCK_K"])
        one = rows * columns * depth / MULTIPLY_ADDS / kernel.warps
        yield {
            "kernel": kernel.kernel,
            "arch": arch,
            "short": int(constants["SHORT_SUMS"]),
            "adapter": int(constants.get("HAS_ADAPTER", 0)),
            "narrow": min(rows, columns),
            "registers": kernel.registers,
            "spills": kernel.spill_bytes,
            "sums": {name.split()[1]: n / one for name, n in found.items() if "HMMA " in name},
        }


if __name__ == "__main__":
    block, archs = "block" in sys.argv, [int(word) for word in sys.argv[1:] if word.isdecimal()]
    print(json.dumps([row for arch in archs for row in variants(arch, block)]))
