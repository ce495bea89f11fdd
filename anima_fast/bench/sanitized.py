"""A few parity cases for compute-sanitizer: every op once, at an odd shape, with gaps in memory.

    compute-sanitizer --tool memcheck python -m anima_fast.bench.sanitized

The tool slows everything down a hundredfold, so this is one shape, one layout and one dtype per op.
Ends with status 1 when a value is wrong; the tool reports the rest.
"""

from __future__ import annotations

import sys

import torch

from anima_fast import interpreter


def main() -> int:
    """Run the cases on the card, else interpreted; the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        interpreter.start()
    # Now: triton reads at import whether it interprets.
    from anima_fast.kernels import OPS
    from anima_fast.parity import check_op

    wrong = 0
    for op in OPS.values():
        sizes = op.shapes[min(1, len(op.shapes) - 1)]
        dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
        failed = [c for c in check_op(op, sizes, dtype, layout="strided", device=device)
                  if not c.passed]  # fmt: skip
        wrong += bool(failed)
        print(op.name, "wrong: " + failed[0].tensor if failed else "right", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
