"""`anima-fast parity`: the checks of parity.py as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

import torch

from anima_fast.bench import interpreter
from anima_fast.errors import UserError


def run_parity(names: Sequence[str], *, as_json: bool, say: Callable[[str], None]) -> bool:
    """Check ops (all when `names` is empty) on the card, else in Triton's interpreter.

    Args:
        names: ops by name.
        as_json: print a list of records (parity.as_record) instead of a table.
        say: prints.

    Returns:
        Whether every check passed.

    Raises:
        UserError: an op that does not exist, or Triton is missing.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if device == "cpu":
            # Before anything imports triton.
            interpreter.start()
        from anima_fast.bench import parity
        from anima_fast.kernels.registry import OPS
    except ImportError as error:
        raise UserError(f"the kernels need triton, which is missing: {error}") from error
    for name in names:
        if name not in OPS:
            raise UserError(f"--op {name} is unknown: use one of {', '.join(OPS)}")
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, interpreted"
    checks = []
    if not as_json:
        say(f"kernels against their definitions on {where}; error relative to float64")
    for name in names or OPS:
        found = list(parity.check_all([name], device=device))
        checks += found
        if not as_json:
            for line in table(found):
                say(line)
    passed = all(check.passed for check in checks)
    if as_json:
        say(json.dumps([parity.as_record(check) for check in checks], indent=1))
    else:
        failed = sum(not check.passed for check in checks)
        say(f"{len(checks)} checks, {failed} failed" if failed else f"{len(checks)} checks passed")
    return passed


def table(checks: Iterable) -> list[str]:
    """A line per op, dtype and tensor with the worst of its checks, then the failed ones."""
    worst: dict[tuple, tuple] = {}
    failed = []
    for check in checks:
        key = (check.op, check.dtype, check.tensor)
        ratio = check.error / check.allowed
        if key not in worst or ratio > worst[key][0]:
            worst[key] = (ratio, check)
        if not check.passed:
            failed.append(
                f"  FAILED {check.op} {check.dtype} {check.shape} {check.layout} {check.tensor}: "
                f"error {check.error:.2e}, allowed {check.allowed:.2e} {check.remark}".rstrip()
            )
    lines = [
        f"{op:34}{dtype:10}{tensor:12} error {c.error:.1e}  reference {c.reference_error:.1e}  "
        f"{ratio:4.0%} of what is allowed"
        for (op, dtype, tensor), (ratio, c) in worst.items()
    ]
    return lines + failed
