"""Option values while the rules settle them."""

from __future__ import annotations

from typing import Any


class Draft:
    """Option values that rules read as attributes and change through `set`."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = dict(values)
        self.notices: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["values"][name]

    def set(self, name: str, value: Any, notice: str | None = None) -> None:
        """Change one value; `notice` tells the user why."""
        self.values[name] = value
        if notice:
            self.notices.append(notice)
