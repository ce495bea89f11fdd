"""The previews of a run: what their names, their headers and the log say about them."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from anima_fast.reports.reading import open_shared, picture_prompt, read_whole

FOLDER = "sample"
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
# The newest ones; more would make the page heavy.
MOST_PICTURES = 1000
MOST_PICTURE_BYTES = 256 << 20
MOST_PROMPT = 2000
# [NAME_](e000004|000500)_IDX_yyyymmddHHMMSS[_SEED].png
_NAME = re.compile(
    r"(?:(?P<prefix>.+)_)?(?P<epoch>e)?(?P<at>\d{6,})_(?P<index>\d{2,})_(?P<stamp>\d{14})"
    r"(?:_(?P<seed>-?\d+))?\.\w+"
)


@dataclass(frozen=True)
class PictureFile:
    """A file of the folder: name, seconds since 1970, and what changes with its contents."""

    name: str
    time: float
    stamp: tuple[int, int]


class Pictures:
    """The pictures in the `sample` folder of an output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.found: list[PictureFile] = []
        self.total = 0
        self._headers: dict[PictureFile, dict | None] = {}

    def refresh(self) -> None:
        """List the folder again; `found` is the newest pictures, oldest first."""
        entries = sorted(self._list(), key=lambda one: (one.time, one.name))
        self.total = len(entries)
        self.found = entries[-MOST_PICTURES:]
        self._headers = {one: self._headers[one] for one in self.found if one in self._headers}

    @property
    def version(self) -> str:
        """Changes when a picture is added, removed or rewritten."""
        return f"{len(self.found)}.{hash(tuple(self.found)) & 0xFFFFFFFF:x}"

    def answer(self) -> dict[str, Any]:
        """All pictures that can be read, as JSON holds them, with what their names tell."""
        shown = []
        for one in self.found:
            if one not in self._headers:
                self._headers[one] = read_header(self.folder / one.name)
            if (header := self._headers[one]) is not None:
                base = {"name": one.name, "time": one.time, "version": f"{one.stamp[0]:x}"}
                shown.append({**base, **header, **name_facts(one.name)})
        return {"total": self.total, "pictures": shown}

    def read(self, name: str) -> tuple[bytes, str] | None:
        """The bytes and the type of a picture, None when the folder holds none of that name.

        It must be one of the entries, and a regular file inside the output folder, links followed.
        """
        try:
            if not is_picture(name) or name not in os.listdir(self.folder):
                return None
            path = self._inside(name)
            content = None if path is None else read_whole(path, MOST_PICTURE_BYTES)
        except (OSError, ValueError):
            return None
        return None if content is None else (content, TYPES[Path(name).suffix.lower()])

    def _inside(self, name: str) -> Path | None:
        """The path of an entry, links followed; None when that leads out of the output folder."""
        path = (self.folder / name).resolve(strict=True)
        return path if path.is_relative_to(self.out.resolve()) else None

    def _list(self) -> list[PictureFile]:
        found = []
        # A folder or an entry may vanish while it is read.
        with contextlib.suppress(OSError):
            if self._inside("") is None:
                return []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    if is_picture(entry.name) and self._is_own_file(entry):
                        stat = entry.stat()
                        stamp = (stat.st_mtime_ns, stat.st_size)
                        found.append(PictureFile(entry.name, stat.st_mtime, stamp))
        return found

    def _is_own_file(self, entry: os.DirEntry) -> bool:
        is_own = not entry.is_symlink() or self._inside(entry.name) is not None
        return entry.is_file() and is_own


def is_picture(name: str) -> bool:
    """Whether a file of that name may be shown: a picture, not hidden, a name that a URL holds."""
    if name.startswith(".") or Path(name).suffix.lower() not in TYPES:
        return False
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not set(name) & set("/\\:\0")


def name_facts(name: str) -> dict[str, Any]:
    """`label`, `index`, `seed`, and `epoch` or `step`, from a preview's name; {} from another."""
    found = _NAME.fullmatch(name)
    if not found:
        return {}
    at = int(found["at"])
    return {
        "label": f"{found['epoch'] or ''}{found['at']}",
        "index": int(found["index"]),
        "seed": int(found["seed"]) if found["seed"] else None,
        "epoch" if found["epoch"] else "step": at,
    }


def read_header(path: Path) -> dict[str, Any] | None:
    """Width, height and the prompt written into a picture; None when it cannot be read."""
    try:
        with open_shared(path) as file, Image.open(file) as image:
            width, height = image.size
            prompt = picture_prompt(image.info.get("parameters"))[:MOST_PROMPT]
    # Pillow raises many kinds for damaged files, SyntaxError among them.
    except Exception:
        return None
    return {"width": width, "height": height, "prompt": prompt or None}
