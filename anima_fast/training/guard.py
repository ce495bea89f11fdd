"""May this model be trained in the fp16 that `auto` chose? Its first batch decides, once.

The LoRA gradients of the first batch are computed in bf16 and in fp16, each in a run of its own
that is set up like every run and thrown away. Numbers that are not finite or saturate, or a cosine
below 0.99 between the two, mean bf16. The verdict stays in the card's tuning file, so that this
costs one step for each model, card and version.

A LoRA starts with B = 0, where the gradient of A is zero: the cosine is then that of all B alone.
A network that starts from weights, and LoHa and LoKr, have both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from anima_fast.adapters.network import LoRANetwork
from anima_fast.measure.arithmetic import Arithmetic, set_sums
from anima_fast.measure.sums import card_facts
from anima_fast.measure.verdict import Verdict, keep_verdict, needs_verdict, refused, stored_verdict
from anima_fast.memory.free import free_memory
from anima_fast.training.kind import Say
from anima_fast.training.oom import MemoryPolicies
from anima_fast.training.step import forward_backward

if TYPE_CHECKING:
    from anima_fast.training.run import Run

LEAST_COSINE = 0.99
# A loss scale that is too high is lowered by this, so often.
LOWER, TRIES = 16.0, 8


@dataclass(frozen=True)
class Gradients:
    """LoRA gradients [P] of the first batch, float32 on the host, and what saturated in it."""

    flat: Tensor
    saturated: Mapping[str, int]

    @property
    def finite(self) -> bool:
        """Whether all of them are numbers."""
        return bool(torch.isfinite(self.flat).all())


def judged(
    found: Arithmetic,
    model: str | Path,
    device: torch.device,
    trial: Callable[[Arithmetic], Run],
    *,
    say: Say,
) -> Arithmetic:
    """The arithmetic of a run: `found`, or bf16 where the program chose fp16 and must not.

    Args:
        found, model, device: of the run.
        trial: sets a run up like the one that follows, in another arithmetic.
        say: gets the verdict.
    """
    if not needs_verdict(found):
        return found
    card = card_facts(device)
    verdict = stored_verdict(card, model, found.chain)
    if verdict is None:
        say("comparing fp16 with bf16 on the first batch, once for this model")
        bf16 = refused(found, "")
        with _nothing_changes(device):
            wide, narrow = (_first_gradients(trial, a, device) for a in (bf16, found))
        verdict = compare(narrow, wide, found.chain)
        if verdict is None:
            say("the first batch does not tell fp16 from bf16: its gradients are zero or no number")
            return found
        if not verdict.problem:
            same = "" if verdict.cosine is None else f": gradients' cosine {verdict.cosine:.5f}"
            say(f"fp16 suits this model{same}")
        if (problem := keep_verdict(card, model, verdict)) is not None:
            say(f"this is found out at each start ({problem})")
    if not verdict.problem:
        return found
    say(f"precision: bf16 instead of fp16: {verdict.problem}")
    return refused(found, verdict.problem)


def compare(narrow: Gradients, wide: Gradients, chain: int) -> Verdict | None:
    """The verdict on gradients in fp16 and in bf16; None where they say nothing."""
    if not wide.finite and not narrow.finite:
        return None
    if not narrow.finite:
        return Verdict(chain, None, "LoRA gradients of the first batch are not finite in fp16")
    if counts := {name: n for name, n in narrow.saturated.items() if n}:
        most = max(counts, key=lambda name: counts[name])
        text = f"{sum(counts.values())} numbers of the first batch leave float16, most in {most}"
        return Verdict(chain, None, text)
    if not wide.finite:
        return Verdict(chain, None)
    a, b = narrow.flat.double(), wide.flat.double()
    norms = (a.norm() * b.norm()).item()
    if not norms:
        return None
    cosine = (a @ b).item() / norms
    if cosine >= LEAST_COSINE:
        return Verdict(chain, cosine)
    text = f"LoRA gradients of the first batch differ from bf16's (cosine {cosine:.3f})"
    return Verdict(chain, cosine, text)


def _first_gradients(
    trial: Callable[[Arithmetic], Run], arithmetic: Arithmetic, device: torch.device
) -> Gradients:
    # The run lives in the call alone.
    found = first_gradients(trial(arithmetic))
    free_memory(device, keep_cached=False)
    return found


def first_gradients(run: Run) -> Gradients:
    """The LoRA gradients of the first batch of a fresh run, without dropout."""
    network = run.network
    assert isinstance(network, LoRANetwork)
    network.eval()
    batch = run.batches.load(run.plan.epoch_batches(1, run.seed)[0], epoch=1, step=0)
    policies = MemoryPolicies(run, lambda text: None)
    for _ in range(TRIES):
        ((_, losses),) = forward_backward(run, [batch], policies, step=0)
        saturation = run.dit.saturation
        counts = {} if saturation is None else saturation.take()
        # Copied: the buffer is that of the run.
        found = Gradients(network.flat_grad.detach().float().cpu().clone(), counts)
        scale = run.scaler.get_scale()
        if found.finite or scale <= 1 or not torch.isfinite(losses).all():
            break
        run.scaler.update(max(1.0, scale / LOWER))
        network.zero_grad_flat()
    return found


@contextmanager
def _nothing_changes(device: torch.device) -> Iterator[None]:
    """After the block every generator of random numbers, and the sums, are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        set_sums(0)
