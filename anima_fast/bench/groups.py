"""What `bench run` measures, in groups that each run in a process of their own.

Kernels are either interpreted or compiled in one process, a crash takes one group along, and on a
card memory starts empty.

    python -m anima_fast.bench.groups NAME CHOICE

prints the rows of a group as lines of a run file.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from anima_fast.bench.choice import MODES, WORDS, Choice, mode_of
from anima_fast.bench.run_file import Measurement, row_line

CARD, NO_CARD, ANY = "a CUDA card", "a machine without a card", ""


@dataclass(frozen=True)
class Group:
    """Measurements that one process makes.

    Attributes:
        name: as it is told.
        metrics: that it can measure.
        ops: that it measures; empty: those of the registry.
        function: "module:function" below anima_fast.bench, (choice) → rows as they are done.
        needs: `CARD`, or `ANY`.
        interpreted: whether kernels run in Triton's interpreter where there is no card.
        providers: whose it measures; empty: of everyone.
        quick: whether the quick set has it, which asks for it by name otherwise.
        turns: whether two commits take turns with it, as it is timed; then the quick set has it.
    """

    name: str
    metrics: tuple[str, ...]
    function: str
    ops: tuple[str, ...] = ()
    needs: str = ANY
    interpreted: bool = False
    providers: tuple[str, ...] = ()
    quick: bool = True
    turns: bool = False

    def wanted(self, choice: Choice) -> bool:
        """Whether a choice asks for something of this group."""
        from anima_fast.kernels.registry import OPS

        named = self.quick or not choice.quick or bool(choice.metrics)
        whose = not (choice.providers and self.providers) or bool(
            choice.candidate or not set(self.providers).isdisjoint(choice.providers)
        )
        ops = choice.wants_op(*(self.ops or OPS))
        return named and whose and ops and choice.wants(*self.metrics)

    def rows(self, choice: Choice) -> Iterator[list[Measurement]]:
        """Measure what a choice asks for."""
        if self.interpreted and not _has_card():
            from anima_fast.bench import interpreter

            interpreter.start()
        module, _, name = self.function.partition(":")
        function = getattr(importlib.import_module(f"anima_fast.bench.{module}"), name)
        for rows in function(choice):
            yield list(filter(choice.accepts, rows))


BOTH, OWN = ("own", "eager"), ("own",)
COUNTED = ("launches", "units", "kept", "peak")
COMPILED = ("registers", "spills", "shared", "occupancy")
GROUPS = (
    Group("errors", ("error",), "errors:rows_of", interpreted=True, providers=BOTH),
    Group("block", ("error", "loss"), "curve:rows_of", ("block", "loss"), interpreted=True,
          providers=BOTH),
    Group("launches", COUNTED, "launches:rows", ("block",), providers=BOTH),
    Group("resources", COMPILED, "resources:rows", providers=OWN),
    Group("sass", ("instructions",), "sass:rows", providers=OWN, quick=False),
    Group("compile", ("compile",), "startup:compile_rows", providers=OWN, quick=False),
    Group("program", ("modules",), "startup:rows", ("program",), providers=OWN),
    Group("startup", ("startup",), "startup:second_rows", ("program",), providers=OWN, quick=False,
          turns=True),
    Group("times", ("time", "error", "kept", "peak", "ceiling"), "times:rows", needs=CARD,
          turns=True),
    Group("step", ("time", "peak", "launches"), "step:rows", ("step",), needs=CARD, turns=True),
)  # fmt: skip


def _has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def chosen(choice: Choice) -> tuple[list[Group], list[Group]]:
    """The groups to run here, and those that are asked for by name and cannot run here."""
    card = _has_card()
    wanted = [group for group in GROUPS if group.wanted(choice)]
    able = [group for group in wanted if card or group.needs != CARD]
    covered = {metric for group in able for metric in group.metrics}
    lacking = [
        group
        for group in wanted
        if group not in able
        and (
            not able
            or not covered.issuperset(choice.metrics)
            or not set(group.ops).isdisjoint(choice.ops)
        )
    ]
    return able, lacking


def unmet(choice: Choice, rows: Iterable[Measurement]) -> list[str]:
    """The words of a choice, such as "--provider liger", that no row answers."""
    found: dict[str, set[str]] = {name: set() for name in WORDS}
    for row in rows:
        found["ops"].add(row.op)
        found["dtypes"].add(row.dtype)
        found["providers"].add(row.provider.split()[0])
        found["modes"].add(mode_of(row))
        found["metrics"].add(row.metric)
    if found["modes"].isdisjoint(MODES):
        # None of these metrics tells forward from backward.
        found["modes"].update(MODES)
    return [
        f"{option} {word}"
        for name, option in WORDS.items()
        for word in getattr(choice, name)
        if word not in found[name]
    ]


def print_rows(rows: Iterable[list[Measurement]]) -> None:
    """Lines of a run file on stdout, as they are done."""
    for some in rows:
        sys.stdout.write("".join(map(row_line, some)))
        sys.stdout.flush()


def main(name: str, text: str) -> None:
    """Run one group; rows go to stdout, everything else that is printed to stderr."""
    for group in GROUPS:
        # An older commit may lack one that the program which compares it has.
        if group.name == name:
            print_rows(group.rows(Choice.loads(text)))


if __name__ == "__main__":
    main(*sys.argv[1:])
