"""What was measured on a card, kept for the runs to come: one readable JSON file a card.

    ~/.cache/anima_fast/tuning/nvidia-geforce-rtx-4090.json
    {"card": {"name": ..., "driver": ...}, "sums": {...}, "guard": {...}}

`card` is what the rest holds for: with another driver, PyTorch, Triton or other kernels it counts
as not there, as a damaged file does. Each other section is a table of its own, so that one more
needs no new format. Torch is not imported here: `doctor` reads these files too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.files import cache_home, write_json

KERNELS = Path(__file__).parents[1] / "kernels"
# Where the driver of Linux says its version.
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class CardFacts:
    """What a measurement holds for.

    Attributes:
        name, capability: of the card, the latter as 8.9.
        driver, torch, triton: versions; None where there is none.
        kernels: of the code of this package's kernels.
    """

    name: str
    capability: str
    driver: str | None
    torch: str
    triton: str | None
    kernels: str

    @classmethod
    def of(cls, name: str, capability: tuple[int, int], torch: str) -> CardFacts:
        """The facts of a card with this machine's versions."""
        major, minor = capability
        return cls(
            name, f"{major}.{minor}", driver_version(), torch, version("triton"), kernel_version()
        )


class TuningFile:
    """The file of a card; what cannot be read is empty."""

    def __init__(self, card: CardFacts) -> None:
        self.card = card
        slug = re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-") or "card"
        self.path = cache_home() / "tuning" / f"{slug}.json"

    def section(self, name: str) -> dict[str, Any]:
        """A table of the file; {} where there is none."""
        found = self._read().get(name)
        return found if isinstance(found, dict) else {}

    def add(self, name: str, entries: Mapping[str, Any]) -> str | None:
        """Add entries to a table; returns why they cannot be kept, None when they are."""
        whole = self._read() | {"card": asdict(self.card)}
        whole[name] = {**self.section(name), **entries}
        try:
            write_json(self.path, whole)
        except UserError as error:
            return str(error)
        return None

    def _read(self) -> dict[str, Any]:
        try:
            whole = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        same = isinstance(whole, dict) and whole.get("card") == asdict(self.card)
        return whole if same else {}


def version(package: str) -> str | None:
    """The version of an installed package; None when it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # triton-windows installs `triton` under a name of its own.
        return version("triton-windows") if package == "triton" else None


@functools.cache
def kernel_version() -> str:
    """Changes with the code of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def driver_version() -> str | None:
    """Of NVIDIA's driver; None without one."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        text = done.stdout
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None
