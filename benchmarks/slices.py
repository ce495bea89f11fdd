"""The slices of the suite: what each runs, where it can, and the records that they leave."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anima_fast.kernels.registry import OPS
from benchmarks.rows import ROOT

LIMIT_S = 540.0
# What measurements plan for; starting, compiling and writing take the rest.
PLANNED_S = 420
TOKENS = (1024, 2304, 4096, 9216)
GPU, CPU, ANY = "gpu", "cpu", "any"
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
SANITIZER = "compute-sanitizer"


@dataclass(frozen=True)
class Slice:
    """One command.

    Attributes:
        name: as `--slice` takes it, and of its files.
        title: what it does.
        command: arguments; `python` stands for this interpreter, `{rows}` for its CSV file.
        where: gpu, cpu (sizes for a machine without a card) or any.
        limit_s: it is stopped after so many seconds.
    """

    name: str
    title: str
    command: tuple[str, ...]
    where: str = ANY
    limit_s: float = LIMIT_S


def slices() -> list[Slice]:
    """All slices, in the order in which they run."""
    return [
        Slice("gpu-tests", "tests that need a card", ("python", *_pytest(), "-m", "gpu",
              *gpu_test_files()), GPU),
        *(
            Slice(f"parity-{name}", f"{name} against its definition",
                  ("python", "-m", "anima_fast", "parity", "--op", name, "--json"))
            for name in OPS
        ),
        *(
            Slice(f"ops-{tokens}", f"every op at {tokens} tokens", _bench("ops", tokens), GPU)
            for tokens in TOKENS
        ),
        *(
            Slice(f"memory-{tokens}", f"what a block keeps at {tokens} tokens",
                  _bench("memory", tokens), GPU)
            for tokens in (1024, 4096)
        ),
        *(
            Slice(f"step-{side}-b{batch}", f"training step at {side}x{side}, batch {batch}",
                  (*_bench("step", tokens), "--batch", str(batch)), GPU)
            for side, tokens in ((1024, 4096), (512, 1024))
            for batch in (1, 4)
        ),
        *(
            Slice(f"{what}-tiny", f"{what} benchmark at a tiny size on the CPU", _bench(what), CPU)
            for what in ("ops", "memory", "step")
        ),
        *(
            Slice(f"sanitizer-{tool}", f"a few parity cases under {SANITIZER} {tool}",
                  (SANITIZER, "--tool", tool, "--error-exitcode", "99", "python",
                   "-m", "benchmarks.sanitized"), GPU)
            for tool in ("memcheck", "racecheck")
        ),
        Slice("resources", "registers, spills and shared memory of every kernel, per card",
              ("python", "-m", "anima_fast", "bench", "resources", "--quick", "--json")),
    ]  # fmt: skip


def _pytest() -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def _bench(what: str, tokens: int | None = None) -> tuple[str, ...]:
    size = () if tokens is None else ("--tokens", str(tokens))
    return ("python", *_pytest(), f"benchmarks/test_{what}.py", "--rows", "{rows}",
            "--seconds", str(PLANNED_S), *size)  # fmt: skip


def gpu_test_files() -> list[str]:
    """Test files with a test marked gpu; others may import what a bare machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        f"tests/{file.name}"
        for file in files
        if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    ]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """What stands in a folder, in the order of `slices`; unreadable records are left out."""
    found = []
    for one in slices():
        path = folder / "slices" / f"{one.name}.json"
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return found
