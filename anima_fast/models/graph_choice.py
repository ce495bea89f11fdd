"""Whether to record a step as a CUDA graph: measured, not asked.

A graph saves the host's time. That is worth having where the card waits for the host, which one
plain forward shows: the host's time for its launches beside the card's time from the first to the
last. Where the card is the limit, it is behind, and its time is the longer one. A graph keeps its
memory, so there must be enough of it besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from anima_fast.models.dit_layers import Shared

# The card's time over the host's below which the host is the limit: a card that waits for every
# launch ends a little after the last.
WAITING = 1.25
# Plain forwards of a shape that are timed; the first compiles kernels and is not among them.
TRIES = 3
# Free memory that a recording must find, of what a forward keeps for backward: the graph holds as
# much itself, and its backward more.
ROOM = 2.0


@dataclass
class Launches:
    """Times one forward on the host and on the card, without waiting for the card.

    A context manager around the launches. `pays` tells later, when the card has done them.
    """

    host: float = 0.0
    kept: int = 0
    _events: tuple[Any, ...] = field(default=(), repr=False)
    _start: float = 0.0

    def __enter__(self) -> Launches:
        self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._events[0].record()
        self.kept, self._start = -torch.cuda.memory_allocated(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.host = time.perf_counter() - self._start
        self.kept += torch.cuda.memory_allocated()
        self._events[1].record()

    def pays(self) -> bool:
        """Whether the card waited for the host, and the memory for a graph is there."""
        start, end = self._events
        end.synchronize()
        return start.elapsed_time(end) / 1e3 <= WAITING * self.host and self._fits()

    def _fits(self) -> bool:
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached >= ROOM * self.kept


@dataclass
class Choice:
    """What is known of one size of the inputs."""

    seen: int = 0
    launches: Launches | None = None
    paid: bool = False

    def pays(self) -> bool:
        """Whether a graph of this size pays, by the last timed forward."""
        launches, self.launches = self.launches, None
        self.paid = self.paid or (launches is not None and launches.pays())
        return self.paid

    def plain(
        self,
        timed: Callable[[], Launches],
        run: Callable[[Tensor, Shared], Tensor],
        x: Tensor,
        shared: Shared,
    ) -> Tensor:
        """run(x, shared), timed where that decides."""
        self.seen += 1
        if not 1 < self.seen <= 1 + TRIES:
            return run(x, shared)
        self.launches = timed()
        with self.launches:
            return run(x, shared)
