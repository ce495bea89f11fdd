"""Where pictures go: one named file, numbered files beside each other, or a folder."""

from __future__ import annotations

import re
from pathlib import Path

from anima_fast.errors import UserError
from anima_fast.files import check_folder


class Outputs:
    """Names of the files of a command; several are numbered on from what is there already.

    Args:
        output: a .png file, or a folder (one that exists, or a name without an ending).
        count: how many pictures there will be.
        grid: whether they are cells of grids.

    Raises:
        UserError: a name that is no picture, or a folder that cannot be written.
    """

    def __init__(self, output: str, count: int, *, grid: bool = False) -> None:
        path = Path(output)
        self.is_folder = path.is_dir() or not path.suffix or output.endswith(("/", "\\"))
        if not self.is_folder and path.suffix.lower() != ".png":
            raise UserError(f"--output {output}: give the name of a .png file or of a folder")
        self.folder = path if self.is_folder else path.parent
        self.path, self.single = path, count == 1 and not grid and not self.is_folder
        self.stem = "" if self.is_folder else f"{path.stem}_"
        check_folder(self.folder)
        self.first = self._next(rf"{re.escape(self.stem)}(\d+)\.png")
        self.first_grid = self._next(rf"{re.escape(self.stem)}grid(\d+)\.png")

    def picture(self, number: int) -> Path:
        """The file of a picture."""
        if self.single:
            return self.path
        return self.folder / f"{self.stem}{self.first + number:04d}.png"

    def grid(self, number: int) -> Path:
        """The file of a grid; a single one of a named file has that name."""
        if not self.is_folder and number == 0:
            return self.path
        return self.folder / f"{self.stem}grid{self.first_grid + number:04d}.png"

    def _next(self, pattern: str) -> int:
        names = (re.fullmatch(pattern, path.name) for path in self.folder.glob("*.png"))
        return max((int(match[1]) + 1 for match in names if match), default=0)
