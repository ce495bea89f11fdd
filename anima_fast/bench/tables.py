"""Plain-text tables of what the bench commands find."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anima_fast.bench.resources import Resources


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Aligned columns, two spaces apart: the first `left` of them left, the others right."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def resources_table(rows: Iterable[Resources]) -> str:
    """Per op and kernel one line, per card one column: the worst of the compiled variants.

    A cell reads "registers a thread, KiB of shared memory a block, occupancy in per cent"; each of
    the three is the worst for itself. "!" marks a kernel with a problem.
    """
    rows = list(rows)
    cells: dict[tuple[str, str], dict[int, list[Resources]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        cells[row.op, row.kernel or "(does not compile)"][row.arch].append(row)
    archs = sorted({row.arch for row in rows})
    lines = [
        (op, kernel, *(_worst(by_arch.get(arch, [])) for arch in archs))
        for (op, kernel), by_arch in cells.items()
    ]
    return table(("op", "kernel", *(f"sm_{arch}" for arch in archs)), lines, left=2)


def _worst(rows: Sequence[Resources]) -> str:
    if not rows:
        return "-"
    mark = "!" if any(row.problems for row in rows) else ""
    registers = max(row.registers for row in rows)
    shared = max(row.shared_bytes for row in rows) / 1024
    share = min(row.occupancy for row in rows)
    return f"{mark}{registers} {shared:.1f} {share:.0%}"
