"""Where cache files are, and the index of image hashes next to them.

`cache_dir` when it is given, else `.anima_cache` in the image's folder. An image folder that cannot
be written is served by `OUTPUT_DIR/cache`; what its own `.anima_cache` already holds is still used.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anima_fast import files
from anima_fast.errors import UserError

FOLDER = ".anima_cache"
INDEX = "index.json"
# Long stems are cut (UTF-8 bytes): file systems allow 255 for a name.
_STEM_BYTES = 120


class CacheFolders:
    """Finds and places the cache files of a run with these images."""

    def __init__(
        self,
        cache_dir: str | None,
        output_dir: str | None,
        images: Iterable[Path],
        say: Callable[[str], None],
    ) -> None:
        self._cache_dir = Path(cache_dir) if cache_dir else None
        self._fallback = Path(output_dir) / "cache" if output_dir and not cache_dir else None
        self._all = list(dict.fromkeys(self._folder(image) for image in images))
        self._say = say
        self._writable: dict[Path, Path] = {}

    def find(self, name: str, image: Path, *, anywhere: bool = False) -> Path | None:
        """The existing file of that name for an image; `anywhere` looks next to all images."""
        folders = [self._folder(image), *(self._all if anywhere else [])]
        if self._fallback is not None:
            folders.append(self._fallback)
        found = (folder / name for folder in dict.fromkeys(folders))
        return next((path for path in found if path.is_file()), None)

    def place(self, name: str, image: Path) -> Path:
        """Where to write the file of that name for an image.

        Raises `UserError` when neither the image's folder nor the output folder can be written.
        """
        folder = self._folder(image)
        if folder not in self._writable:
            self._writable[folder] = self._choose_writable(folder)
        return self._writable[folder] / name

    def _folder(self, image: Path) -> Path:
        return self._cache_dir or image.parent / FOLDER

    def _choose_writable(self, folder: Path) -> Path:
        try:
            files.check_folder(folder)
            return folder
        except UserError:
            if self._fallback is None:
                raise
        self._say(f"{folder} cannot be written: caches go to {self._fallback}")
        return self._fallback


def file_hashes(folders: CacheFolders, paths: Iterable[Path], threads: int) -> dict[Path, str]:
    """SHA-256 of files, remembered by (path, size, mtime) in an index in the cache folder.

    Only new and changed files are read. Raises `UserError` naming a file that cannot be.
    """
    names = {path: printable(os.path.abspath(path)) for path in paths}
    stamps = {path: _stamp(path) for path in names}
    known: dict[str, list] = {}
    for index in dict.fromkeys(folders.find(INDEX, path) for path in names):
        if index is not None:
            known = _read_index(index) | known
    new = [path for path, name in names.items() if known.get(name, [])[:2] != stamps[path]]
    changed: dict[Path, dict[str, list]] = defaultdict(dict)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for path, sha256 in zip(new, pool.map(_sha256, new), strict=True):
            known[names[path]] = [*stamps[path], sha256]
    for path in new:
        changed[folders.place(INDEX, path)][names[path]] = known[names[path]]
    for index, entries in changed.items():
        old = {name: e for name, e in _read_index(index).items() if os.path.exists(name)}
        files.write_json(index, old | entries)
    return {path: known[name][2] for path, name in names.items()}


def latent_name(stem: str, key: str) -> str:
    """File name of an image's latents."""
    short = printable(stem).encode("utf-8")[:_STEM_BYTES].decode("utf-8", "ignore")
    return f"{short}-{key[:16]}.latents.safetensors"


def text_name(key: str) -> str:
    """File name of a caption's encoding."""
    return f"{key}.text.safetensors"


def printable(name: str) -> str:
    """A file name as valid Unicode: invalid bytes (Linux allows them) become `_`."""
    return "".join("_" if "\ud800" <= c <= "\udfff" else c for c in name)


def _read_index(index: Path) -> dict[str, list]:
    """The entries of an index; nothing for a missing or damaged one, which only costs time."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str)
    }


def _stamp(path: Path) -> list[int]:
    with _readable(path):
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns]


def _sha256(path: Path) -> str:
    with _readable(path):
        return files.sha256_file(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the file") from error
