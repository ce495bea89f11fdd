"""What a prediction of memory is: items with bytes, what of them is in memory together, the peak.

Full fine-tuning (finetune.py) and LoRA training (lora.py) are predicted by the same kind of object,
and compared with what can be used in the same way (fit.py). Sizes come from the headers of the
model files, nothing is loaded. What has been neither counted nor measured is a constant here or
there, marked "Assumed".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar

import torch

from anima_fast.models.dit_config import TEXT_ROWS

if TYPE_CHECKING:
    from anima_fast.options.run import FinetuneOptions, TrainOptions

    Options = TrainOptions | FinetuneOptions

OptionsT = TypeVar("OptionsT", bound="Options")
GIB = 2**30
# Assumed: what a CUDA context with its libraries takes of a card.
CONTEXT_GIB = 0.8
CONTEXT_BYTES = int(CONTEXT_GIB * GIB)
# Assumed: the share of free memory that can be used before fragmentation gets in the way.
USABLE_SHARE = 0.95
# Assumed: what the program itself takes of host memory.
PROGRAM_BYTES = 3 * GIB
# The same without a card, whose libraries are most of it: 0.5 GiB at the end of a tiny run, of
# which the greater part is taken before free memory is measured.
CPU_PROGRAM_BYTES = GIB // 2
# Assumed peak inside one block's backward, in units of one [B, L, D] tensor: GELU, its gradient and
# the pre-activation's (4 each), the normed input and the residual gradient. What is recomputed
# there comes on top.
WORKSPACE_UNITS = 14.0


class Item(NamedTuple):
    """One thing that takes memory; items of the same `text` are one line of a plan."""

    key: str
    size: int
    text: str


@dataclass(frozen=True)
class Phase:
    """What is on the device together at one moment of a stage (encoding, training, previews)."""

    stage: str
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes of a run: the moments that may be the peak, and host memory at its peak.

    `assumed`: what the figures rest on without having been measured, in sentences.
    """

    phases: tuple[Phase, ...]
    host: int
    assumed: tuple[str, ...] = ()

    @property
    def largest(self) -> Phase:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def device(self) -> int:
        """Peak on the device."""
        return self.largest.size

    def __getitem__(self, key: str) -> int:
        """Bytes of the items of a key, in the phase where they are largest; 0 without any."""
        return max(sum(i.size for i in phase.items if i.key == key) for phase in self.phases)

    def rows(self) -> list[tuple[str, int]]:
        """What the peak on the device consists of, for people."""
        found: dict[str, int] = {}
        for item in self.largest.items:
            found[item.text] = found.get(item.text, 0) + item.size
        return list(found.items())

    def stages(self) -> dict[str, int]:
        """The peak of each stage, in their order."""
        found: dict[str, int] = {}
        for phase in self.phases:
            found[phase.stage] = max(found.get(phase.stage, 0), phase.size)
        return found


@dataclass(frozen=True)
class LargestBatch:
    """The largest batch of a dataset.

    Attributes:
        images, tokens: B and L.
        rows: S, the T5 tokens of the longest caption; it has these or fewer unless captions are
            encoded whole.
        words: tokens of the longest caption for Qwen3.
    """

    images: int
    tokens: int
    rows: int = TEXT_ROWS
    words: int = TEXT_ROWS

    @property
    def pixels(self) -> int:
        """Of one image: a token is a patch of 16x16."""
        return 256 * self.tokens


class Modes(NamedTuple):
    """How images and texts come to a step (data/encode.py).

    image: cached or live. text: context, states (the LLM adapter runs) or live (Qwen3 too).
    """

    image: str
    text: str


@dataclass(frozen=True)
class Needs(ABC, Generic[OptionsT]):
    """The prediction for any options of one kind of training, on the same data and device.

    Attributes:
        batch, device: of the run.
        modes: see `Modes`.
        state_bytes: what the optimizer keeps, measured on small tensors: per trained number for
            full fine-tuning, of the whole network for a LoRA.
        subject: what messages call this kind.
        remedies: changes of options that save device memory, in the order of what they cost. Block
            swap is none of them: how many blocks it takes is searched for.
        together: those that can be made one on top of the other.
        last_resort: what to do when all of them are not enough.
    """

    batch: LargestBatch
    device: torch.device
    modes: Callable[[OptionsT], Modes]
    state_bytes: Callable[[OptionsT], float]
    subject: ClassVar[str]
    remedies: ClassVar[tuple[dict, ...]]
    together: ClassVar[tuple[dict, ...]]
    last_resort: ClassVar[str]

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Of the DiT."""

    @abstractmethod
    def __call__(self, options: OptionsT) -> Prediction:
        """The prediction; `UserError` for options that cannot work."""

    @abstractmethod
    def allows(self, before: OptionsT, after: OptionsT) -> bool:
        """Whether changed options can train, and train the same."""

    @property
    def program(self) -> int:
        """Host memory of the program itself."""
        return CPU_PROGRAM_BYTES if self.device.type == "cpu" else PROGRAM_BYTES


def stored_bytes(path: str | None) -> int:
    """Bytes of a model file, or of those in a folder; they are published in 16 bit."""
    given = Path(path or "")
    files = given.glob("*.safetensors") if given.is_dir() else [given]
    return sum(file.stat().st_size for file in files)
