"""What the image phase and the caption phase share: opening cache files and writing missing ones.

Each file is written as soon as its batch is done, so an interrupted run continues where it stopped.
The models are loaded only when something is missing, and freed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from anima_fast.data import cache
from anima_fast.data.cache import CacheError, LatentEntry, Stored, TextEntry
from anima_fast.data.cache_folders import CacheFolders
from anima_fast.data.encode_models import EncodingModels
from anima_fast.options.run import AnyRun
from anima_fast.progress import ItemProgress

CacheEntry = TypeVar("CacheEntry", LatentEntry, TextEntry)


@dataclass(frozen=True)
class EncodeJob:
    """One cache file: its key and path."""

    key: str
    path: Path


AnyJob = TypeVar("AnyJob", bound=EncodeJob)


@dataclass
class EncodePhase(ABC, Generic[AnyJob, CacheEntry]):
    """Turns what is trained into cache entries.

    `keep`: entries stay in memory, instead of being read for every batch.
    """

    options: AnyRun
    folders: CacheFolders
    models: EncodingModels
    keep: bool
    say: Callable[[str], None]

    unit: ClassVar[str]
    # A static method: path -> entry.
    read: ClassVar[Any]

    @abstractmethod
    def entries(self, jobs: list[AnyJob]) -> Iterator[tuple[AnyJob, CacheEntry]]:
        """Run the models, in whatever order and batches suit them."""

    @abstractmethod
    def origin(self, job: AnyJob) -> dict[str, str]:
        """What the file says about where it comes from."""

    def open(self, path: Path, check: Callable[[], None]) -> Stored[CacheEntry] | None:
        """The entry of a file; None, and a notice, when `check` or reading refuses it."""
        try:
            if not self.options.skip_cache_check:
                check()
            return Stored(path, self.read, self.read(path) if self.keep else None)
        except CacheError as error:
            self.say(f"cache file {path} cannot be used ({error}): encoded again")
            return None

    def encode(self, missing: Sequence[AnyJob]) -> dict[Path, Stored[CacheEntry]]:
        """Encode and write the files of these jobs.

        Raises `UserError` for input that cannot be encoded, a missing model, a full disk.
        """
        stored: dict[Path, Stored[CacheEntry]] = {}
        title = f"encoding {self.unit}"
        with ItemProgress(title, len(missing), self.unit, self.say) as progress:
            try:
                for job, entry in self.entries(list(missing)):
                    cache.write(job.path, entry, job.key, self.origin(job))
                    stored[job.path] = Stored(job.path, self.read, entry if self.keep else None)
                    progress.advance(1)
            finally:
                self.models.free()
        return stored
