"""Non-finite numbers: find the image and the stage, skip the batch, stop if it keeps happening."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import Checkpoint
from anima_fast.models.dit_layers import scale_for

if TYPE_CHECKING:
    from anima_fast.data.batches import Batch

# Bad batches are counted among this many recent ones per bad batch allowed: a single bad image of a
# small set stops the run and is named, while one in a hundred is always skipped.
WINDOW_PER_BATCH = 20
SHOWN_IMAGES = 5
# Where to look when every batch of a run is bad.
NO_STEP = (
    "it lies in the model file, the precision or the caches: try --mixed_precision no, then delete "
    "the caches and encode again"
)


class BadBatchTracker:
    """Decides per optimizer step whether its gradient may be used.

    `limit` bad batches are skipped before the run stops; precision and rate are for the diagnosis.
    `made` counts the steps whose gradient was used, also those of the run before it resumed.
    `base_fault` says what is wrong with the model files (None: nothing); it is asked when the first
    batches of a run are bad, which no rate and no image explains.
    """

    def __init__(
        self,
        limit: int,
        *,
        precision: str,
        learning_rate: float,
        made: int = 0,
        base_fault: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.made, self._base_fault = made, base_fault
        self._base_tested = False
        self.limit, self.precision, self.learning_rate = limit, precision, learning_rate
        self.recent: deque[tuple[str, list[str]] | None] = deque(
            maxlen=WINDOW_PER_BATCH * max(1, self.limit)
        )
        self.told_overflow = False

    def accepts(
        self,
        group: Sequence[tuple[Batch, Tensor]],
        loss: float,
        norm: float,
        scaler: torch.amp.GradScaler | None = None,
        *,
        say: Callable[[str], None],
    ) -> bool:
        """Whether to make the step; if not, `say` has told why.

        Args:
            group: the batches of this step, each with its per-sample losses [B].
            loss: their mean loss.
            norm: the norm of the gradient.
            scaler: if enabled, the gradient may overflow; the scaler then skips the step itself
                and lowers its scale, and the batch is not at fault.
            say: gets one line per skipped batch.

        Raises:
            UserError: the diagnosis, once more than `max_bad_batches` recent batches were bad; at
                once when the model is not finite.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.made += 1
            self.recent.append(None)
            return True
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        if math.isfinite(loss) and scale > 1:
            if not self.told_overflow:
                say(f"fp16 gradients overflowed at loss scale {scale:g}: it is lowered")
            self.told_overflow = True
            self.recent.append(None)
            return True
        stage, images = find_fault(group)
        if not self.made and not self._base_tested and stage in ("loss", "gradient"):
            self._base_tested = True
            if fault := self._base_fault():
                raise UserError(f"the {stage} of the first batch is not finite: {fault}")
        self.recent.append((stage, images))
        bad = [entry for entry in self.recent if entry is not None]
        if len(bad) > self.limit:
            raise UserError(self._diagnosis(bad))
        say(f"skipped a batch: the {stage} is not finite ({_listed(images)})")
        return False

    def _diagnosis(self, bad: Sequence[tuple[str, list[str]]]) -> str:
        """One line: what went wrong, where, and what to try."""
        stages = [stage for stage, _ in bad]
        stage = max(set(stages), key=stages.count)
        images = list(dict.fromkeys(name for _, names in bad for name in names))
        return (
            f"{len(bad)} of the last {len(self.recent)} batches were not finite, in the {stage} "
            f"({_listed(images)}): {'; '.join(self._hints(stage))}"
        )

    def _hints(self, stage: str) -> list[str]:
        precision = self.precision
        if stage == "latents":
            return [
                "look at these images, delete their latent caches and encode again"
                + ("" if precision == "no" else " with --no_half_vae")
            ]
        if stage == "text context":
            return ["delete the text caches of these images and encode again, best in bf16"]
        hints = []
        if precision == "fp16":
            hints.append("fp16 overflows easily: use --mixed_precision bf16, or no")
        if not self.made:
            hints.append(f"no step was made, so the rate is not the reason: {NO_STEP}")
            return hints
        return [
            *hints,
            f"lower --learning_rate (now {self.learning_rate:g}) to a tenth",
            f"if it goes on, try --attn_mode torch (PyTorch {torch.__version__})",
        ]


def fault_of_files(paths: Iterable[str | None], dtype: torch.dtype) -> str | None:
    """Names the first tensor of model files that is not finite, as stored or in the dtype of a run.

    Reads every file whole. None if all are.
    """
    for path in filter(None, paths):
        checkpoint = Checkpoint.open(path)
        for name in checkpoint.shapes:
            tensor = checkpoint.get(name)
            if not tensor.is_floating_point():
                continue
            # Weights of layers may be stored divided by a power of two (models/dit_layers.py).
            scale = scale_for(tensor) if dtype == torch.float16 and tensor.ndim == 2 else 1.0
            if (tensor.float() / scale).to(dtype).isfinite().all():
                continue
            count = int((~tensor.float().isfinite()).sum())
            if count:
                return f"{name} in {path} has {count} values that are no numbers: download it again"
            text = str(dtype).removeprefix("torch.")
            return f"{name} in {path} is too large for {text}: use --mixed_precision bf16, or no"
    return None


def find_fault(group: Sequence[tuple[Batch, Tensor]]) -> tuple[str, list[str]]:
    """The first stage that is not finite ("gradient" if no other is), and paths of its images."""
    for stage in ("latents", "text context", "loss"):
        bad = []
        for batch, losses in group:
            context = getattr(batch.text, "context", getattr(batch.text, "source_states", None))
            tensor = {"latents": batch.latents, "text context": context, "loss": losses}[stage]
            if tensor is not None:
                rows = tensor.detach()[:, None].flatten(1)  # [B, ...]
                bad += _names(batch, (~torch.isfinite(rows)).any(1).tolist())
        if bad:
            return stage, bad
    return "gradient", [name for batch, _ in group for name in _names(batch)]


def _names(batch: Batch, chosen: list[bool] | None = None) -> list[str]:
    chosen = chosen or [True] * len(batch.items)
    return [str(item.path) for item, use in zip(batch.items, chosen, strict=True) if use]


def _listed(images: list[str]) -> str:
    more = len(images) - SHOWN_IMAGES
    return ", ".join(images[:SHOWN_IMAGES]) + (f" and {more} more" if more > 0 else "")
