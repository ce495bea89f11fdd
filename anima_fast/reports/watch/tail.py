"""Following a text file that grows, one complete line at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from anima_fast.reports.watch.reading import open_shared

# A longer line is no line of ours: it is skipped.
MOST_LINE_BYTES = 1 << 20
# So many bytes before the place reached are compared at every read.
_CHECKED = 256


class Tail:
    """The lines added to a file since the last read.

    A file that was replaced or cut is noticed by its contents: the last bytes that were read must
    still stand where they stood. Inode numbers are not asked, as some network file systems
    change them.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.position = 0
        self.size = 0
        self.bytes_read = 0
        # Whether the last read took all that it might, so that more may wait.
        self.behind = False
        # Counts how often reading began anew.
        self.generation = 0
        self._before = b""
        self._skipping = False

    def start(self, position: int = 0) -> None:
        """Read from `position` on; the line that it may cut is left out."""
        self.generation += 1
        self.position = position
        self._before = b""
        self._skipping = position > 0

    def read(self, most: int, start_at_end: bool = False) -> list[bytes]:
        """The complete lines that follow, without their line ends.

        Args:
            most: bytes to read at most; what is left comes with the next call.
            start_at_end: begin a file, when reading begins anew, only `most` bytes before its end.

        Returns:
            The lines; none when the file is absent. `generation` tells whether they follow the
            ones of the call before.
        """
        try:
            if not self.path.is_file():
                return self._lost()
            with open_shared(self.path) as file:
                self.size = file.seek(0, os.SEEK_END)
                if not self._is_the_same(file):
                    self.start()
                if start_at_end and self.position == 0 and self.size > most:
                    self.start(self.size - most)
                file.seek(self.position)
                content = file.read(most)
        except (OSError, ValueError):
            return []
        self.bytes_read += len(content)
        self.behind = len(content) == most
        return self._take(content, most)

    def _lost(self) -> list[bytes]:
        self.size, self.behind = 0, False
        if self.position:
            self.start()
        return []

    def _is_the_same(self, file: BinaryIO) -> bool:
        if self.size < self.position:
            return False
        file.seek(self.position - len(self._before))
        found = file.read(len(self._before))
        self.bytes_read += len(found)
        return found == self._before

    def _take(self, content: bytes, most: int) -> list[bytes]:
        """Move behind the last complete line of `content` and return its lines."""
        end = content.rfind(b"\n") + 1
        if not end and len(content) >= min(most, MOST_LINE_BYTES):
            end, self._skipping = len(content), True
            lines = []
        else:
            lines = content[:end].split(b"\n")[:-1]
            if lines and self._skipping:
                self._skipping = False
                del lines[0]
        self.position += end
        self._before = (self._before + content[:end])[-_CHECKED:]
        return [line.removesuffix(b"\r") for line in lines]
