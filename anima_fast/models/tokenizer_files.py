"""Where tokenizer files are looked for, and how they are fetched when they are not found.

Order: the Qwen3 directory itself, the explicit option, a folder next to the text encoder, the
models folder that `anima-fast download` fills, the Hugging Face hub cache, and finally (unless
offline) the hub itself, from which only the tokenizer files are taken. An explicit path that is
wrong is an error; it never falls through to the next place.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from anima_fast.errors import UserError
from anima_fast.models.download import models_folder


class TokenizerMissing(UserError):
    """No tokenizer in any of the places that are searched."""


@dataclass(frozen=True)
class TokenizerSource:
    """One tokenizer: its names for users and the sets of files that define it, best first."""

    title: str
    option: str
    folder: str
    repositories: tuple[str, ...]
    layouts: tuple[tuple[str, ...], ...]

    @property
    def wanted(self) -> str:
        """The files, for a message."""
        return " or ".join(" + ".join(layout) for layout in self.layouts)


QWEN3 = TokenizerSource(
    "Qwen3 tokenizer",
    "--qwen3_tokenizer_path",
    "qwen3_tokenizer",
    ("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B"),
    (("tokenizer.json",), ("vocab.json", "merges.txt", "tokenizer_config.json")),
)
T5 = TokenizerSource(
    "T5 tokenizer",
    "--t5_tokenizer_path",
    "t5_tokenizer",
    ("google-t5/t5-base", "google/t5-v1_1-xxl"),
    (("tokenizer.json",), ("spiece.model",)),
)


def find_files(
    source: TokenizerSource,
    qwen3_path: str | Path | None,
    explicit: str | Path | None,
    models_dir: str | Path | None,
    *,
    fetch: bool = True,
) -> list[Path]:
    """The files of a tokenizer, in the order of their layout.

    fetch: ask the hub for files found nowhere else. Raises `UserError` when the explicit path holds
    none, and `TokenizerMissing` when they are nowhere and cannot, or should not, be fetched.
    """
    named = explicit_files(source, Path(explicit)) if explicit is not None else None
    folder = Path(qwen3_path) if qwen3_path is not None else None
    if source is QWEN3 and folder is not None and (files := _files_in(source, folder)):
        return files
    if named:
        return named
    ours = models_folder(models_dir) / source.folder
    for place in (*_places(source, folder), ours):
        if files := _files_in(source, place):
            return files
    if files := _from_hub_cache(source):
        return files
    found = _download(source) if fetch else "nothing is downloaded here"
    if isinstance(found, list):
        return found
    raise TokenizerMissing(
        f"no {source.title} found, and {' '.join(found.split())[:200]}: run `anima-fast download`, "
        f"or put {source.wanted} of https://huggingface.co/{source.repositories[0]} into "
        f"{ours}, or name a folder with {source.option}"
    )


def explicit_files(source: TokenizerSource, path: Path) -> list[Path]:
    """The files in a folder that the user named; `UserError` when it holds none."""
    files = _files_in(source, path)
    if files is None and path.is_file() and (path.name,) in source.layouts:
        files = [path]
    if files is None:
        found = "holds none of them" if path.is_dir() else "is not a folder"
        raise UserError(f"{source.option} needs a folder with {source.wanted}, but {path} {found}")
    return files


def _files_in(source: TokenizerSource, folder: Path) -> list[Path] | None:
    for layout in source.layouts:
        if all((folder / name).is_file() for name in layout):
            return [folder / name for name in layout]
    return None


def _places(source: TokenizerSource, qwen3_path: Path | None) -> list[Path]:
    """Folders in and next to the text encoder."""
    if qwen3_path is None:
        return []
    folders = (source.folder, "t5") if source is T5 else (source.folder,)
    return [place / folder for folder in folders for place in (qwen3_path, qwen3_path.parent)]


def _from_hub_cache(source: TokenizerSource) -> list[Path] | None:
    from huggingface_hub import try_to_load_from_cache

    for repository in source.repositories:
        for layout in source.layouts:
            paths = [try_to_load_from_cache(repository, name) for name in layout]
            # Besides a path the hub library returns None or a marker for "known to be absent".
            found = [Path(path) for path in paths if isinstance(path, str)]
            if len(found) == len(layout) and all(path.is_file() for path in found):
                return found
    return None


def _download(source: TokenizerSource) -> list[Path] | str:
    """The files, fetched from the hub; or why not."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    if not _reachable(constants.ENDPOINT):
        return f"{constants.ENDPOINT} cannot be reached"
    for layout in source.layouts:
        try:
            return [Path(hf_hub_download(source.repositories[0], name)) for name in layout]
        except EntryNotFoundError as error:
            # The repository lacks this layout: try the next. No connection looks the same.
            reason = error
        # The network library under the hub client raises its own types.
        except Exception as error:
            return f"fetching it failed: {error}"
    return f"fetching it failed: {reason}"


def _reachable(endpoint: str) -> bool:
    """Whether the hub answers at all: its client would retry for most of a minute."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
