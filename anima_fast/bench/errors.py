"""Errors of the kernels as rows of a run file: the cases of the parity table, and what is kept.

baseline.py compares these rows with stored ones, so they hold no chance: the same program on the
same machine makes the same six digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from anima_fast.bench.cases import (
    case_text,
    chosen_cases,
    implementations,
    only_forward,
    timed_dtypes,
)
from anima_fast.bench.choice import Choice, name_of
from anima_fast.bench.parity import LAYOUTS, Check, check_op
from anima_fast.bench.providers import OWN
from anima_fast.bench.run_file import Measurement
from anima_fast.device import one_thread
from anima_fast.errors import UserError
from anima_fast.kernels.op import Op, Sizes
from anima_fast.kernels.registry import OPS
from anima_fast.measure.timer import reason

# A row of a run file has a part for each case with at least so many elements: the error of fewer is
# chance, and the rule alone judges it.
LEAST = {torch.float16: 100, torch.bfloat16: 100}
LEAST_WIDE = 500


def cases(op: Op, quick: bool = False) -> Iterator[tuple[Sizes, torch.dtype, str]]:
    """Shape, dtype and layout of every check of an op; `quick` leaves out about five of six.

    A layout is a matter of addresses, which do not depend on the dtype: float64 and the shapes of
    the model, which are slow, run in the plain one alone.
    """
    first = op.model_shapes[:1]
    wide = (*op.shapes[1:2], *first) if quick else (*op.shapes, *op.model_shapes)
    for sizes in () if op.of_half else wide:
        yield sizes, torch.float64, "plain"
    for dtype in op.dtypes:
        if quick and dtype != torch.bfloat16 and not op.of_half:
            continue
        for sizes in op.shapes:
            for layout in LAYOUTS[:1] if quick else LAYOUTS:
                yield sizes, dtype, layout
        for sizes in first if quick else op.model_shapes:
            yield sizes, dtype, "plain"


def known_ops(names: Sequence[str], further: Sequence[str] = ()) -> None:
    """Raise `UserError` for a name that is no op and none of `further`."""
    for name in names:
        if name not in (*OPS, *further):
            raise UserError(f"--op {name} is unknown: use one of {', '.join((*OPS, *further))}")


def check_cases(
    op: Op,
    chosen: Iterable[tuple[Sizes, torch.dtype, str]],
    device: torch.device | str = "cpu",
    dtypes: Sequence[str] = (),
) -> Iterator[Check]:
    """Check an op at cases, or at those of some dtypes."""
    for sizes, dtype, layout in chosen:
        if not dtypes or name_of(dtype) in dtypes:
            yield from check_op(op, sizes, dtype, layout=layout, device=device)


def rows(checks: Iterable[Check], source: str) -> list[Measurement]:
    """Two rows an op, dtype and tensor: the kernel's error and, as provider eager, the reference's.

    The value is that of the case nearest to what is allowed, parts hold every case that is no
    chance, a note names the first that is wrong. Six digits are kept: a repeated run has the same.
    """
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.op, check.dtype, check.tensor), []).append(check)
    found = []
    for (op, dtype, tensor), some in groups.items():
        # What an expanded layout allows is its own error on a dense copy: always next to 100 %.
        dense = [check for check in some if check.layout != "expanded"] or some
        worst = max(dense, key=lambda check: check.error / check.allowed)
        wrong = [str(check) for check in some if not check.passed]
        least = LEAST.get(getattr(torch, dtype), LEAST_WIDE)
        least = min(least, max(check.elements for check in some))
        row = Measurement(
            op,
            "error",
            digits(worst.error),
            "relative",
            dtype=dtype,
            mode=tensor,
            parts={c.case: digits(c.error) for c in some if c.elements >= least},
            source=source,
            note=wrong[0] if wrong else "",
        )
        eager = replace(row, value=digits(worst.reference_error), parts={}, note="")
        found += [row, replace(eager, provider="eager")]
    return found


def digits(value: float) -> float:
    """`value` with six significant digits."""
    return float(f"{value:.6g}")


def error_rows(
    op: Op, device: torch.device | str = "cpu", quick: bool = False, dtypes: Sequence[str] = ()
) -> list[Measurement]:
    """Rows of a run file for an op."""
    return rows(check_cases(op, cases(op, quick), device, dtypes), source_of(device))


def source_of(device: torch.device | str) -> str:
    """Where the numbers of a device come from."""
    return "card" if torch.device(device).type == "cuda" else "interpreter"


def rows_of(choice: Choice) -> Iterator[list[Measurement]]:
    """The rows that `bench run` asks for, op by op: of our kernel, and of a candidate.

    With sizes an op is checked at those alone, in the shapes of the model for the rest.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with one_thread():
        for op in OPS.values():
            if not choice.wants_op(op.name):
                continue
            op = only_forward(op, choice)
            some = list(cases(op, choice.quick))
            if choice.sizes:
                some = [(sizes, dtype, "plain") for _, sizes in chosen_cases(op, choice)
                        for dtype in timed_dtypes(op, choice)]  # fmt: skip
            text = case_text("", choice.sizes)
            for name, one in implementations(op, choice).items():
                found = _provider_rows(one, name, some, device, choice)
                yield [replace(row, case=text) for row in found]


def _provider_rows(op: Op, name: str, some: list, device: str, choice: Choice) -> list[Measurement]:
    try:
        found = rows(check_cases(op, some, device, choice.dtypes), source_of(device))
    except Exception as error:
        if name == OWN:
            raise
        # It is the user's code: whatever it does is a finding about it.
        hint = " (no backward? --mode fwd)" if "grad_fn" in str(error) else ""
        note = reason(error) + hint
        return [Measurement(op.name, "error", None, "relative", provider=name, note=note)]
    if name == OWN:
        return found
    return [replace(row, provider=name) for row in found if row.provider == OWN]
