"""Ctrl-C and SIGTERM become a flag that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading


class StopSignal:
    """Context manager: `received` holds the signal number after the first Ctrl-C or SIGTERM.

    The second one acts as if nothing had been installed (it ends the program at once). Outside the
    main thread, where Python allows no handlers, nothing is installed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _frame: object) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
