"""The shapes and types at which ops are timed, profiled and disassembled: those of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from anima_fast.bench.choice import Choice, name_of
from anima_fast.bench.providers import OWN, load_candidate
from anima_fast.kernels.op import Op, Sizes
from anima_fast.measure.step_time import PARAMETER_OPS, lora_parameters

TOKENS = (1024, 2304, 4096, 9216)


def real_cases(
    op: Op, given: Sizes, tokens: Iterable[int] = TOKENS
) -> Iterator[tuple[str, dict[str, int]]]:
    """(label, sizes) of the real shapes of an op at images of `tokens`, each once.

    `given` replaces sizes by their letters, as `--case` has them.
    """
    seen: list[Sizes] = []
    for count in tokens:
        for label, real in op.real_shapes(count).items():
            sizes = {k: given.get(k, v) for k, v in real.items()}
            # M is the tokens of all samples, and the self attention's S is its L.
            if "M" in sizes and real["M"] == count and "M" not in given:
                sizes["M"] = count * given.get("B", 1)
            if op.name in PARAMETER_OPS and "R" in given:
                sizes[PARAMETER_OPS[op.name]] = lora_parameters(given["R"])
            if sizes not in seen:
                seen.append(sizes)
                yield label, sizes


def chosen_cases(op: Op, choice: Choice) -> Iterator[tuple[str, dict[str, int]]]:
    """`real_cases` of a choice; a quick one has one image."""
    tokens = [choice.sizes["L"]] if "L" in choice.sizes else TOKENS[2:3] if choice.quick else TOKENS
    return real_cases(op, choice.sizes, tokens)


def only_forward(op: Op, choice: Choice) -> Op:
    """The op without gradients where forward alone is asked for: a candidate may have no more."""
    return replace(op, grads=()) if choice.modes == ("fwd",) else op


def implementations(op: Op, choice: Choice) -> dict[str, Op]:
    """Provider → op: ours, and the same with a candidate as its function."""
    further = load_candidate(choice.candidate) if choice.candidate else {}
    calls = {OWN: op.function, **further}
    return {name: replace(only_forward(op, choice), function=call) for name, call in calls.items()}


def case_text(label: str, sizes: Sizes) -> str:
    """A case as rows name it, such as "qkv M=4096 N=2048 K=2048"."""
    return " ".join(filter(None, (label, *(f"{k}={v}" for k, v in sizes.items()))))


def timed_dtypes(op: Op, choice: Choice) -> list[torch.dtype]:
    """Those asked for that the op has, else bfloat16 (float32 of adapter states)."""
    if choice.dtypes:
        return [d for d in op.dtypes if name_of(d) in choice.dtypes]
    wanted = torch.float32 if op.name in PARAMETER_OPS else torch.bfloat16
    return [wanted if wanted in op.dtypes else op.dtypes[0]]
