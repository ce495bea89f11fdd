"""What a Triton kernel reads and writes, found in its intermediate code (TTIR).

Pointers enter a kernel as arguments and go through splats, offsets, loops and branches until a load
or a store uses them. `accesses` follows them, so that no table of what a kernel touches can go
stale. Of a kernel without a loop around a load the number of elements is known as well: a row
kernel that is given a packed tensor and reads two thirds of it counts as two thirds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LOCATION = re.compile(r' loc\((?:[^()"]|"[^"]*"|\([^()]*\))*\)')
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_ARGUMENT = re.compile(r"(%[\w$.-]+): (\S+)")
_RESULT = re.compile(r"\s*(%[\w$.-]+)(?::\d+)? = (.*)")
_CARRIED = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)")
_TILE = re.compile(r"tensor<((?:\d+x)+)!tt\.ptr")
READS = ("tt.load", "tt.descriptor_load", "tt.descriptor_gather", "tt.atomic")
WRITES = ("tt.store", "tt.descriptor_store", "tt.descriptor_scatter", "tt.descriptor_reduce",
          "tt.atomic")  # fmt: skip
LOOPS = ("scf.for", "scf.while")


@dataclass
class Access:
    """Elements that one program of a kernel reads and writes through one argument.

    Infinite where that hangs on a loop.
    """

    read: float = 0
    written: float = 0


def accesses(code: str, arguments: Sequence[str]) -> dict[str, Access]:
    """What a kernel does with each of its pointers; those that it never uses are left out.

    Args:
        code: TTIR of one function, all helpers inlined.
        arguments: names of its arguments, in its order.
    """
    found: dict[str, Access] = {}
    # The arguments that a value points into.
    roots: dict[str, frozenset[str]] = {}
    # The result and the operation of each region that is open.
    regions: list[tuple[str, str]] = []
    for line in _lines(code):
        if line.lstrip().startswith("tt.func"):
            own = zip(_ARGUMENT.findall(line), arguments, strict=True)
            roots = {v: frozenset([name]) for (v, kind), name in own if kind.startswith("!tt.ptr")}
            continue
        result, operation = _parts(line)
        operands = [roots.get(value, frozenset()) for value in _VALUE.findall(operation)]
        if operation.startswith("}") and regions:
            closed = regions.pop()
            if operation.startswith("} else"):
                regions.append(closed)
                continue
        if operation.startswith("scf.yield") and regions:
            _join(roots, regions[-1][0], operands)
        elif "iter_args(" in operation:
            carried = _CARRIED.findall(operation.split("iter_args(")[1])
            starts = [roots.get(start, frozenset()) for _, start in carried]
            roots |= {inner: start for (inner, _), start in zip(carried, starts, strict=True)}
            _join(roots, result, starts)
        else:
            looped = any(name.startswith(LOOPS) for _, name in regions)
            _note(found, operation, operands, looped)
            if result and not operation.startswith(READS):
                roots[result] = frozenset().union(*operands)
        if operation.endswith("{"):
            regions.append((result, operation))
    return found


def _lines(code: str) -> Iterator[str]:
    for line in code.splitlines():
        if line.startswith(" "):
            yield _LOCATION.sub("", line).rstrip()


def _parts(line: str) -> tuple[str, str]:
    """The result of an operation, "" without one, and the rest of its line."""
    match = _RESULT.match(line)
    return (match[1], match[2]) if match else ("", line.strip())


def _join(roots: dict[str, frozenset[str]], result: str, values: Sequence[frozenset[str]]) -> None:
    """A region's result may be any of the values that are handed out of it."""
    for i, value in enumerate(values):
        for name in (f"{result}#{i}", *([result] if len(values) == 1 else [])):
            roots[name] = roots.get(name, frozenset()) | value


def _note(
    found: dict[str, Access], operation: str, operands: Sequence[frozenset[str]], looped: bool
) -> None:
    if not operation.startswith((*READS, *WRITES)):
        return
    tile = _TILE.search(operation)
    sizes = tile[1].rstrip("x").split("x") if tile else []
    elements = math.inf if looped or "descriptor" in operation else math.prod(map(int, sizes))
    for name in operands[0]:
        access = found.setdefault(name, Access())
        access.read += elements if operation.startswith(READS) else 0
        access.written += elements if operation.startswith(WRITES) else 0


def touched(access: Access, elements: int, programs: int) -> tuple[int, int]:
    """(read, written) elements of a tensor of `elements`, each once, by a grid of `programs`."""
    read, written = (int(min(elements, each * programs)) for each in (access.read, access.written))
    return read, written


def has_product(code: str) -> bool:
    """Whether a kernel multiplies matrices."""
    return "tt.dot" in code
