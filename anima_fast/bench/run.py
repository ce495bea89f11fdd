"""`bench run`: the groups of a choice, each in a process, their rows in one run file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from anima_fast.bench.choice import Choice
from anima_fast.bench.environment import ROOT, environment
from anima_fast.bench.groups import Group
from anima_fast.bench.run_file import Measurement, RunWriter, parse_row

# A group that takes longer hangs.
LIMIT_S = 1800.0


def default_name(where: dict[str, Any]) -> Path:
    """COMMIT-MACHINE-TIME.jsonl in the folder that `bench history` reads by itself."""
    words = where.get("card") or where.get("processor") or "cpu"
    machine = "-".join("".join(c if c.isalnum() else " " for c in words).lower().split()[:6])
    moment = where["date"].replace(":", "").removesuffix("+0000")
    return Path("bench_output") / f"{where.get('commit', 'installed')}-{machine}-{moment}.jsonl"


def command(group: Group, choice: Choice) -> list[str]:
    """What measures a group."""
    return [sys.executable, "-m", "anima_fast.bench.groups", group.name, choice.dumps()]


class Running:
    """One group at work: a process whose rows come through a queue."""

    def __init__(self, group: Group, choice: Choice, root: Path, queue: Queue) -> None:
        self.group, self.start, self.rows = group, time.monotonic(), 0
        # Kept open: the process writes into it.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        variables = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        variables.pop("TRITON_INTERPRET", None)
        paths = [str(root), variables.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.process = subprocess.Popen(
            command(group, choice), cwd=root, env=variables, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(queue,), daemon=True).start()

    def _read(self, queue: Queue) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            queue.put((self, line))
        self.process.wait()
        queue.put((self, None))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def problem(self) -> str:
        """Why the group failed, once it ended; "" when it did not."""
        if not self.process.returncode:
            return ""
        self._log.seek(0)
        last = [line.strip() for line in self._log if line.strip()][-1:]
        return "".join(last)[:300] or f"exit status {self.process.returncode}"

    def stop(self) -> None:
        """End it and all that it started."""
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()


def at_once(groups: Sequence[Group]) -> int:
    """How many groups may run at the same time: one where a card is timed."""
    if any(group.needs for group in groups):
        return 1
    return max(1, min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))


def run_groups(
    groups: Sequence[Group],
    choice: Choice,
    path: Path,
    *,
    say: Callable[[str], None],
    show: Callable[[str, int], None] = lambda name, rows: None,
    root: Path = ROOT,
) -> tuple[list[Measurement], list[str]]:
    """Measure groups into a new run file.

    Args:
        groups: of `groups.chosen`.
        choice: what to measure of them.
        path: the file; it holds what is done at any time.
        say: a line for each group as it ends.
        show: (group, rows so far), for a display.
        root: the checkout whose code is measured.

    Returns:
        The rows, and a sentence for each group that failed.

    Raises:
        UserError: the file cannot be written.
    """
    where = environment()
    if root != ROOT:
        from anima_fast.bench.environment import commit

        where |= commit(root)
    writer, waiting = RunWriter(path, where), list(groups)
    found: list[Measurement] = []
    problems: list[str] = []
    queue: Queue = Queue()
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once(groups):
                running.append(Running(waiting.pop(0), choice, root, queue))
            try:
                one, line = queue.get(timeout=LIMIT_S)
            except Empty:
                names = ", ".join(one.group.name for one in running)
                problems.append(f"{names}: stopped after {LIMIT_S:.0f} s without a row")
                break
            if line is None:
                running.remove(one)
                why = one.problem()
                say(f"{one.group.name}: {one.rows} rows, {one.seconds:.0f} s"
                    + (f", failed: {why}" if why else ""))  # fmt: skip
                problems += [f"{one.group.name} failed: {why}"] if why else []
                continue
            row = parse_row(line, f"the rows of {one.group.name}")
            one.rows += 1
            show(one.group.name, one.rows)
            found.append(row)
            writer.add([row])
    finally:
        for one in running:
            one.stop()
    return found, problems


def wrong(rows: Sequence[Measurement]) -> list[str]:
    """What must not be, whatever it was before: values of ours or of a candidate that are wrong or
    not timed for it, kernels that spill, do not fit or do not compile."""
    found = []
    for row in rows:
        judged = row.provider.startswith("own") or ":" in row.provider
        untimed = row.metric == "time" and row.value is None
        if judged and row.note and (row.metric == "error" or untimed):
            found.append(f"{row}: {row.note}")
        # One of the metrics of a compiled kernel speaks for it.
        if row.metric == "registers" and row.note:
            found.append(row.note)
    return found


def remarks(rows: Sequence[Measurement]) -> list[str]:
    """What a reader of the numbers must know: who was left out, and whether the card was slowed."""
    found = [f"left out: {row}: {row.note}" for row in rows
             if row.note and row.metric == "error" and not wrong([row])]  # fmt: skip
    slowed = [row for row in rows if row.metric == "time" and row.samples and row.note]
    return found + ([f"{len(slowed)} times: {slowed[0].note}"] if slowed else [])
