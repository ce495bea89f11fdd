"""A few parity cases for compute-sanitizer: every op at two odd shapes, with gaps in memory.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitized

The tool slows everything down a hundredfold, so this is one layout and one dtype per op, at a shape
of less than a tile and at one of several, whose loops and pipelines run more than once.
Ends with status 1 when a value is wrong; the tool reports the rest.
"""

from __future__ import annotations

import sys

import torch

from anima_fast.bench import interpreter


def main() -> int:
    """Run the cases on the card, else interpreted; the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        interpreter.start()
    # Now: triton reads at import whether it interprets.
    from anima_fast.bench.parity import check_op
    from anima_fast.kernels.registry import OPS

    wrong = 0
    for op in OPS.values():
        dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
        checks = (check_op(op, sizes, dtype, layout="strided", device=device)
                  for sizes in op.shapes[1:3])  # fmt: skip
        failed = [c for found in checks for c in found if not c.passed]
        wrong += bool(failed)
        print(op.name, "wrong: " + failed[0].tensor if failed else "right", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
