"""All of `anima-fast dataset`: survey, tables or JSON, page, pictures of masks."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from anima_fast.errors import UserError
from anima_fast.files import check_folder
from anima_fast.progress import Bars
from anima_fast.reports.dataset.masks import draw_masks
from anima_fast.reports.dataset.page import write_page
from anima_fast.reports.dataset.record import make_record
from anima_fast.reports.dataset.survey import survey_dataset
from anima_fast.reports.dataset.terminal import show_record

if TYPE_CHECKING:
    from anima_fast.options.run import TrainOptions

HTML_IMAGES = 400


def report_dataset(
    options: TrainOptions,
    *,
    html: str | None = None,
    html_images: int | None = None,
    json: bool = False,
    masks: str | None = None,
    headers_only: bool = False,
) -> list[bool]:
    """Report on the data of a run, as the options say; for each problem, whether it stops training.

    Raises `UserError` for a broken configuration, a missing folder, or a place that cannot be
    written.
    """
    _check_targets(html, masks)
    with Bars() as bars:
        survey = survey_dataset(
            options,
            decode=not headers_only,
            thumbnails=html is not None,
            on_progress=bars.show,
            masked=masks is not None,
        )
        written = []
        if masks is not None:
            written.append(draw_masks(survey, Path(masks), on_progress=bars.show))
        record = make_record(survey)
        if html is not None:
            most = HTML_IMAGES if html_images is None else html_images
            page = write_page(record, survey.thumbnails(), Path(html), most_images=most)
            written.append(f"wrote {page}")
    if json:
        print(json_text.dumps(record, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        show_record(record, console)
        for line in written:
            console.print(line, soft_wrap=True)
    return [problem["stops"] for problem in record["problems"]]


def _check_targets(html: str | None, masks: str | None) -> None:
    """Refuse targets that cannot be written, before minutes of reading."""
    if html is not None and Path(html).is_dir():
        raise UserError(f"--html {html} is a folder: give the name of a file, such as data.html")
    if html is not None and Path(html).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html {html}: a page is written there; give a name that ends in .html")
    if html is not None:
        check_folder(Path(html).parent)
    if masks is not None and Path(masks).is_file():
        raise UserError(f"--masks {masks} is a file: give the name of a folder")
