"""How a run is asked to stop: Ctrl-C, a closed terminal, a scheduler's warning.

Before the first step there is nothing to save and the run ends at once. After it the first signal
is remembered, the loop ends after its step and saves. Launchers and shells pass a Ctrl-C on, so
that it comes twice: what follows within two seconds is the same stop. A later one leaves without
saving, but never while a file is being written.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from anima_fast.errors import Stopped

TEXT = "stopping and saving; press again to leave WITHOUT saving"
# Seconds in which a signal that comes again is the same stop.
ONE_STOP_SECONDS = 2.0


class StopSignal:
    """Context manager around a run: `received` holds the number of the first signal.

    Outside the main thread, where Python allows no handlers, nothing is installed. A SIGHUP that is
    ignored when the program starts (nohup) stays ignored.

    Args:
        say: gets `TEXT` at the moment of the first signal, in another thread.
    """

    # Not every system has every one.
    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1")

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.received: int | None = None
        # Whether there is something to save, so that a signal waits for the loop.
        self.waits = False
        self._say = say
        self._saving = 0
        self._first = float("-inf")
        self._previous: dict[int, Any] = {}
        self._close = contextlib.ExitStack()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in self.NAMES:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            self._previous[number] = signal.signal(number, self._receive)
        # Without a socket or a thread the line is not said; the run stops all the same.
        with contextlib.suppress(OSError, RuntimeError):
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()
        if self.received is None:
            self._restore()
        else:
            # The same stop may come again until the program has ended.
            for number in self._previous:
                signal.signal(number, self._receive_late)

    def is_due(self) -> bool:
        """Whether the run shall stop."""
        return self.received is not None

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Inside the block no signal ends the program."""
        self._saving += 1
        try:
            yield
        finally:
            self._saving -= 1

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.received is not None
        if again and (self._saving or now - self._first < ONE_STOP_SECONDS):
            return
        self.received = self.received or number
        self._first = now
        if again or not self.waits:
            raise Stopped(number)

    def _receive_late(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._first < ONE_STOP_SECONDS:
            return
        previous = self._previous[number]
        self._restore()
        if callable(previous):
            previous(number, frame)
        else:
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _listen(self) -> None:
        """Start the thread that answers: a handler waits for the call that the program is in."""
        ours, theirs = socket.socketpair()
        self._close.callback(ours.close)
        self._close.callback(theirs.close)
        theirs.setblocking(False)
        thread = threading.Thread(target=self._answer, args=(ours,), daemon=True)
        thread.start()
        previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

        def end() -> None:
            signal.set_wakeup_fd(previous)
            theirs.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=1)

        self._close.callback(end)

    def _answer(self, ours: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while numbers := ours.recv(16):
                if self.waits and any(number in self._previous for number in numbers):
                    self._say(TEXT)
                    return
