"""HTML pages from the templates in this folder.

A page is one file: styles and pictures are inside and it holds no script, so it can be moved,
mailed or opened years later without a network. Every value is escaped unless it is markup itself.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

STYLE = (files(__package__) / "templates" / "style.css").read_text(encoding="utf-8")


def render(template: str, **values: Any) -> Markup:
    """The text of a file in `templates`, filled with `values`."""
    return Markup(_templates().get_template(template).render(values))


def data_url(data: bytes, kind: str = "jpeg") -> str:
    """The bytes of a picture as a URL that holds them; `kind` is `jpeg` or `png`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("anima_fast.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # A name that a page does not have is an error, not an empty place.
        undefined=StrictUndefined,
    )
    environment.filters["file_name"] = lambda file: Path(file).name
    return environment
