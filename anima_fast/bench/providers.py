"""Who computes an op: our kernel, the eager model, torch.compile of it, libraries, a candidate.

Every provider takes the arguments of `Op.function` and returns what it returns, so that parity and
time are measured alike. `eager` is what the eager model calls, with its roundings, which for most
ops is the definition itself (`Op.reference`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anima_fast.errors import UserError
from anima_fast.kernels.adamw import NORM_EPS
from anima_fast.kernels.op import Op, wide
from anima_fast.models.attention import attention, prepare_zero_rows
from anima_fast.models.dit_layers import EPS, Modulation, layernorm_modulate
from anima_fast.models.rope import apply_rope

Provider = Callable[..., Any]
OWN, EAGER, COMPILE = "own", "eager", "compile"


@dataclass(frozen=True)
class Library:
    """A rival: its call, and the package that must be installed for it (PyTorch's own: "")."""

    call: Provider
    package: str = ""


# What the eager model calls, where that is not the definition.


def _attention(
    q: Tensor, k: Tensor, v: Tensor, zero_keys: Tensor | None = None, mode: str = "torch"
) -> Tensor:
    rows = None
    if zero_keys is not None:
        rows = prepare_zero_rows(_numbers(zero_keys), len(q), q.dtype, q.device)
    return attention(q, k, v, zero_keys=rows, mode=mode)


def _numbers(x: Tensor) -> list[Any]:
    """The values of a small tensor, fetched once: in training they are known off the card, and a
    timed call must not wait for it."""
    if id(x) not in _fetched:
        _fetched[id(x)] = x, x.tolist()
    return _fetched[id(x)][1]


_fetched: dict[int, tuple[Tensor, list[Any]]] = {}


def _gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _seam(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    x = _gate_residual(x, y, gate)
    return x, layernorm_modulate(x, Modulation(shift[:, None], scale[:, None]), x.dtype)


def _qk_norm_rope(
    packed: Tensor, weights: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    parts = []
    for part, weight in zip(packed.unbind(2), weights, strict=False):
        x = wide(part)
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight).to(part.dtype)
        if cos is not None and sin is not None:
            # Angles come as halves here, and each half twice to the model.
            x = apply_rope(x, *(torch.cat([t, t], -1) for t in (cos, sin)))
        parts.append(x)
    return torch.stack(parts, 2)


# Libraries.


def _forced(backend: SDPBackend) -> Provider:
    def call(q: Tensor, k: Tensor, v: Tensor, zero_keys: Tensor | None = None) -> Tensor:
        with sdpa_kernel(backend):
            return _attention(q, k, v, zero_keys)

    return call


def _layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None]).to(dtype or x.dtype)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, EPS)


def _liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    ops = importlib.import_module("liger_kernel.ops.rms_norm")
    # offset 0, casts as Llama's, not in place.
    return ops.LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _adamw(update: Callable[..., None]) -> Provider:
    """adamw with `update` of one range: (p, g, m, v, lr, settings), in place."""

    def call(p: Tensor, g: Tensor, m: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, ...]:
        # Copies, as those of our own provider.
        p, m, v = p.clone(), m.clone(), v.clone()
        if settings["max_norm"]:
            g = g * (settings["max_norm"] / (settings["norm"] + NORM_EPS)).clamp(max=1)
        start = 0
        ends, rates = _numbers(settings["range_ends"]), _numbers(settings["lrs"])
        for end, lr in zip(ends, rates, strict=True):
            update(*(t[start:end] for t in (p, g, m, v)), lr, settings)
            start = end
        return p, m, v

    return call


def _update_fused(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, given: Any) -> None:
    torch._fused_adamw_(
        [p], [g], [m], [v], [], [torch.full((), float(given["step"]), device=p.device)],
        lr=lr, beta1=given["beta1"], beta2=given["beta2"], weight_decay=given["weight_decay"],
        eps=given["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip


def _update_bitsandbytes(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, given: Any) -> None:
    importlib.import_module("bitsandbytes.functional").optimizer_update_32bit(
        "adam", g, p, m, given["beta1"], given["eps"], given["step"], lr, v, given["beta2"],
        weight_decay=given["weight_decay"],
    )  # fmt: skip


EAGER_CALLS: Mapping[str, Provider] = {
    "attention": _attention,
    "gelu": F.gelu,
    "gate_residual": _gate_residual,
    "gate_residual_layernorm_modulate": _seam,
    "adamw": _adamw(_update_fused),
    "qk_norm_rope": _qk_norm_rope,
}
LIBRARIES: Mapping[str, Mapping[str, Library]] = {
    "attention": {
        "sdpa-flash": Library(_forced(SDPBackend.FLASH_ATTENTION)),
        "sdpa-cudnn": Library(_forced(SDPBackend.CUDNN_ATTENTION)),
        "sdpa-efficient": Library(_forced(SDPBackend.EFFICIENT_ATTENTION)),
        "flash-attn": Library(functools.partial(_attention, mode="flash"), "flash_attn"),
        "xformers": Library(functools.partial(_attention, mode="xformers"), "xformers"),
    },
    "layernorm_modulate": {"layer_norm": Library(_layer_norm)},
    "rmsnorm": {"rms_norm": Library(_rms_norm), "liger": Library(_liger_rms_norm, "liger_kernel")},
    "adamw": {"bitsandbytes": Library(_adamw(_update_bitsandbytes), "bitsandbytes")},
}


def eager_of(op: Op) -> Provider:
    """What the eager model calls for an op."""
    return _rival(op, EAGER_CALLS.get(_plain_name(op), op.reference))


def libraries_of(op: Op) -> dict[str, Library]:
    """The rivals of an op beside eager, installed or not."""
    found = LIBRARIES.get(_plain_name(op), {})
    return {name: Library(_rival(op, one.call), one.package) for name, one in found.items()}


def _plain_name(op: Op) -> str:
    """Short sums and rows with powers are ways of ours: their rivals are those of the op itself."""
    return op.name.removesuffix("_short").removesuffix("_powers")


def _rival(op: Op, call: Provider) -> Provider:
    """`call`, without the chain of short sums, which is ours alone."""
    if not op.yardstick or call is op.reference:
        return call

    def without(*args: Any, chain: int | None = None, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return without


def providers(op: Op, candidate: Mapping[str, Provider] | None = None) -> dict[str, Provider]:
    """Name → call of everyone who can compute an op here; a candidate last."""
    found = {
        OWN: op.function,
        EAGER: eager_of(op),
        COMPILE: torch.compile(eager_of(op), dynamic=False),
    }
    for name, library in libraries_of(op).items():
        if not library.package or importlib.util.find_spec(library.package):
            found[name] = library.call
    return found | dict(candidate or {})


def provider_names() -> list[str]:
    """Every name that `--provider` takes."""
    names = [name for libraries in LIBRARIES.values() for name in libraries]
    return list(dict.fromkeys((OWN, EAGER, COMPILE, *names)))


def load_candidate(text: str) -> dict[str, Provider]:
    """`FILE.py:function` or `package.module:function`, as {its name: the function}.

    Raises `UserError` for what is not there, and for a module that fails when imported.
    """
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise UserError(f"--candidate {text}: expected FILE.py:function or a.module:function")
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"--candidate {text}: there is no file {path}")
    try:
        module = _module_of(path) if path.suffix == ".py" else importlib.import_module(place)
    except Exception as error:
        raise UserError(f"--candidate {text}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--candidate {text}: {place} has no function {name}")
    return {f"{path.stem}:{name}": function}


def _module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"candidate_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Triton finds a kernel's source by its module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def work(op: Op, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Mode → (bytes, operations) of a call, from the registry."""
    cost = op.cost(sizes, dtype.itemsize)
    return {
        "fwd": (cost.forward_bytes, cost.forward_flops),
        "bwd": (cost.backward_bytes, cost.backward_flops),
        "both": (
            cost.forward_bytes + cost.backward_bytes,
            cost.forward_flops + cost.backward_flops,
        ),
    }
