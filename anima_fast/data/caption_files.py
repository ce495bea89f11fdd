"""The caption file of an image: which one it is, what it says, and files that look like one.

A caption is a text file with the image's stem. With `caption_extension` .json it is an object,
`{"caption": TEXT, "tags": ...}` or `{"tags": [...], "nl": TEXT}`. Everything is UTF-8.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from anima_fast.data.captions import Caption
from anima_fast.data.subset import Subset
from anima_fast.errors import UserError
from anima_fast.files import read_text

DEFAULT_CAPTION_EXTENSIONS = (".txt", ".caption")
# Endings, in any case, of files that people expect to be read as captions.
_LOOKALIKES = (
    *DEFAULT_CAPTION_EXTENSIONS, ".captions", ".cap", ".tags", ".tag", ".text", ".json",
)  # fmt: skip
_JSON_FORMS = (
    'is JSON of another form: expected {"caption": "..."} or {"tags": ["...", ...], "nl": "..."}'
)


def caption_endings(extension: str | None) -> tuple[str, ...]:
    """The endings of caption files in the order in which they are tried."""
    if extension is None:
        return DEFAULT_CAPTION_EXTENSIONS
    return (extension if extension.startswith(".") else "." + extension,)


def caption_file(image: Path, extension: str | None) -> Path | None:
    """The caption file of an image; tried second, that of its stem without a face box."""
    stems = [image.stem]
    parts = image.stem.split("_")
    if len(parts) > 4:
        stems.append("_".join(parts[:-4]))
    for stem in stems:
        for ending in caption_endings(extension):
            path = os.path.join(image.parent, stem + ending)
            if os.path.isfile(path):
                return Path(path)
    return None


def read_caption(file: Path, subset: Subset) -> Caption:
    """What a caption file says; `class_tokens` where it is empty. `UserError` where unreadable."""
    text = read_text(file, "caption file").strip()
    if text and file.suffix.lower() == ".json":
        try:
            text, tags = _of_json(json.loads(text), subset.caption_separator)
        except (ValueError, RecursionError) as error:
            why = _JSON_FORMS if type(error) is ValueError else f"is not valid JSON ({error})"
            raise UserError(f"caption file {file} {why}") from None
    else:
        tags = ""
    blank = not (text or tags)
    return Caption(subset.class_tokens or "" if blank else text, tags, file=file, blank=blank)


def _of_json(entry: object, separator: str) -> tuple[str, str]:
    """Caption and tags of a JSON object; `ValueError` for any other form."""
    if not isinstance(entry, dict) or not entry.keys() & {"caption", "tags", "nl"}:
        raise ValueError
    glue = separator if separator[-1].isspace() else separator + " "
    tags = entry.get("tags") or ""
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = glue.join(tag.strip() for tag in tags if tag.strip())
    caption, sentence = entry.get("caption") or "", entry.get("nl") or ""
    if not all(isinstance(text, str) for text in (tags, caption, sentence)):
        raise ValueError
    tags, caption, sentence = tags.strip(), caption.strip(), sentence.strip()
    if caption:
        return caption, tags
    return glue.join(part for part in (tags, sentence) if part), ""


def plain(name: str) -> str:
    """A name without case and in one Unicode form, as some file systems compare it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def lookalikes(images: Iterable[Path]) -> dict[Path, str]:
    """For images without a caption, the name of a file beside them that may be meant as one.

    It has another ending, case or Unicode form, or is named after the whole file name.
    """
    beside: dict[Path, dict[str, str]] = {}
    found = {}
    for image in images:
        folder = image.parent
        if folder not in beside:
            parts = [(name, *os.path.splitext(name)) for name in sorted(os.listdir(folder))]
            near = {plain(stem): n for n, stem, end in parts if end.lower() in _LOOKALIKES}
            beside[folder] = near
        names = beside[folder]
        if name := names.get(plain(image.stem)) or names.get(plain(image.name)):
            found[image] = f"{name} beside it is not read"
    return found
