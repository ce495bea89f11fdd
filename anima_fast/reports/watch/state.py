"""What a run is doing, in one word and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Without any news for so long a run is called stalled. Loading and caching say little.
QUIET_S, QUIET_BEFORE_STEPS_S = 300.0, 900.0
# Slow steps are given this many of their own length.
_QUIET_STEPS = 10
ENDED = {
    "finished": "The run is complete.",
    "interrupted": "The run was stopped and saved; the same command with --resume auto goes on.",
    "failed": "The run ended with an error",
}
# Last lines of a console log whose run ended while it read data and models: run.json tells nothing.
_ERROR, _STOPPED = "error: ", "interrupted"


def describe_state(
    run: Mapping[str, Any],
    *,
    step: float | None,
    step_s: float | None,
    quiet_s: float | None,
    says: str | None = None,
    goes_on: bool = False,
) -> dict[str, str]:
    """`name` (for the badge) and `text` (a sentence) of a run.

    Args:
        run: `run.json`, empty when there is none.
        step: the last step in the log.
        step_s: seconds per step.
        quiet_s: seconds since the run last wrote anything.
        says: the last line of the console log; None when there is none.
        goes_on: whether an ended run speaks again.
    """
    said = str(run.get("state"))
    if said in ENDED and goes_on:
        step = None
    elif said == "failed":
        return _failed(run.get("error"))
    elif said in ENDED:
        return {"name": said, "text": ENDED[said]}
    if says is not None and says.startswith(_ERROR):
        return _failed(says.removeprefix(_ERROR))
    if says == _STOPPED:
        return {"name": "interrupted", "text": "The run was stopped before it made a step."}
    if not run and step is None and says is None:
        return {"name": "waiting", "text": "No run has written here yet."}
    limit = QUIET_S if step is not None else QUIET_BEFORE_STEPS_S
    if quiet_s is not None and quiet_s > max(limit, _QUIET_STEPS * (step_s or 0.0)):
        return _stalled(quiet_s, has_run_file=bool(run))
    if step is None:
        return {"name": "preparing", "text": "Reading data and models; no step was made yet."}
    return {"name": "running", "text": "Training."}


def _failed(error: object) -> dict[str, str]:
    reason = f": {error}" if error else "."
    return {"name": "failed", "text": f"{ENDED['failed']}{reason}"}


def _stalled(quiet_s: float, has_run_file: bool) -> dict[str, str]:
    minutes = int(quiet_s // 60)
    since = f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
    if has_run_file:
        text = f"No update for {since}: it hangs, or was killed. Its console may tell more."
        return {"name": "stalled", "text": text}
    return {"name": "ended", "text": f"No update for {since}, and no run.json that says why."}
