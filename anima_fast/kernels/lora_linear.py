"""y = x Wᵀ + s·(x Aᵀ) Bᵀ with frozen W, for one layer or several that read one input.

    forward    h_i = x A_iᵀ                        y_i = x W_iᵀ + s_i·h_i B_iᵀ
    backward   g_i = s_i·dy_i B_i                  dx = Σ_i dy_i W_i + g_i A_i
               dA_i = g_iᵀ x                       dB_i = s_i·dy_iᵀ h_i

q, k and v stacked are one call: their adapters share one product x [A_q; A_k; A_v]ᵀ, their results
are columns of one tensor. W has no gradient, ever. Kept: x, which the caller has anyway, and h
([M, ΣR]). A dropout on h is a given factor per element; it is part of h and of g.

Two implementations of the same sums:

    triton   the adapter inside the base product's accumulator (gemm.py): y is written once
    cublas   the base product by cuBLAS, the adapter added to y by cuBLAS with β = 1: y is written,
             read and written again, 2·M·N more values, for a base product at the library's speed.
             Adapters of one rank and strength are one batched product: a single one has too few
             tiles for a large card. Where a gelu follows or precedes, the adapter is added by our
             kernel, which takes the gelu along

With short float16 sums (sums.py) `triton` computes x Wᵀ + s·h Bᵀ and dy W + g A so; h, g, dA and dB
are narrow, bound by memory, and keep float32 sums. No library ends its chains as early, so `auto`
takes `triton` then.

`auto` looks the card up in `MEASURED`; on a card without an entry it takes cuBLAS, which no Triton
product can beat by more than the adapter's traffic, 3 % at M = 4096, N = K = 2048.

FLOPs: forward 2·M·K·ΣN + 2·M·Σ R·(K + N), backward the same and 2·M·Σ R·(K + N) more.
Source: Hu et al. 2021 (LoRA).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.gelu import gelu_backward, gelu_forward
from anima_fast.kernels.gemm import gemm
from anima_fast.kernels.op import Cost, Inputs, Op, Sizes, randn
from anima_fast.kernels.products import by_part, gemm_product, library_product, stacked
from anima_fast.kernels.sums import chain_of, with_short_sums

IMPLEMENTATIONS = ("auto", "triton", "cublas")
# Compute capability → the largest count of tokens at which the Triton product was measured to be
# faster. No card has been measured.
MEASURED: dict[int, int] = {}


def lora_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    implementation: str = "auto",
    chain: int | None = None,
) -> Tensor:
    """The definition; see `lora_linear`. Rounds where the eager layers do."""
    results = []
    for w, a, b, s in zip(weights, downs, ups, scales, strict=True):
        y = F.linear(x, w)
        if len(a):
            y = y + s * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        results.append(y)
    return torch.cat(results, -1)


def uses_triton(x: Tensor, implementation: str = "auto", chain: int = 0) -> bool:
    """Whether the products of these tokens [M, K] run in Triton."""
    if not dispatch.runs_triton(x) or implementation == "cublas":
        return False
    if implementation == "triton" or chain or not x.is_cuda or dispatch.forced():
        return True
    major, minor = torch.cuda.get_device_capability(x.device)
    return len(x) <= MEASURED.get(10 * major + minor, 0)


@functools.cache
def _slices(*sizes: int) -> tuple[slice, ...]:
    """The slices of parts of these sizes laid side by side."""
    ends = itertools.accumulate(sizes)
    return tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))


def _places(
    weights: Sequence[Tensor], downs: Sequence[Tensor]
) -> tuple[tuple[slice, ...], tuple[slice, ...], list[int]]:
    """Columns of y, columns of h, and which parts have an adapter."""
    # On small images the host is the limit, and `len` of a tensor is slower than its shape.
    sizes = [a.shape[0] for a in downs]
    columns, ranks = _slices(*[w.shape[0] for w in weights]), _slices(*sizes)
    return columns, ranks, [i for i, size in enumerate(sizes) if size]


def _alike(ups: Sequence[Tensor], scales: Sequence[float]) -> bool:
    """Whether several layers have adapters that one batched product computes."""
    kinds = {(*b.shape, s) for b, s in zip(ups, scales, strict=True)}
    return len(ups) > 1 and len(kinds) == 1 and ups[0].shape[1] > 0


def lora_linear_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    *,
    factors: Sequence[Tensor | None] | None = None,
    gelu: bool = False,
    weight_scale: float = 1.0,
    counter: tuple[Tensor, int] | None = None,
    implementation: str = "auto",
    chain: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, h, gelu(y)) without autograd.

    Args:
        x: [M, K].
        weights, downs, ups, scales: as `lora_linear`, adapters in x's dtype.
        factors: [M, R_i] each, multiplied to h_i (dropout), or None.
        gelu: compute gelu(y) too.
        weight_scale: a power of two, by which the stored weights are multiplied.
        counter: counts and the first of a place in them for each part, where the Triton product
            holds float16 results within its range (gemm.py).
        implementation: auto, triton or cublas.
        chain: terms that float16 sums at a time; None as `use_sums` says.

    Returns:
        y [M, ΣN]; h [M, ΣR], None without adapters; gelu(y) or None.
    """
    chain = chain_of(x, chain)
    rows, triton = x.shape[0], uses_triton(x, implementation, chain)
    columns, ranks, adapted = _places(weights, downs)
    h = act = None
    if adapted:
        a = stacked([downs[i] for i in adapted])
        h = _times(gemm(x, a) if triton else x @ a.T, ranks, factors)  # [M, ΣR]
    if triton:
        y = dispatch.empty(rows, columns[-1].stop, like=x)
        act = dispatch.empty(rows, columns[-1].stop, like=x) if gelu else None
        for i, w in enumerate(weights):
            part = None if act is None else act[:, columns[i]]
            adapter = None
            if h is not None and i in adapted:
                adapter = (h[:, ranks[i]], ups[i], scales[i])
            place = None if counter is None else (counter[0], counter[1] + i)
            gemm(
                x, w, adapter=adapter, scale=weight_scale, out=y[:, columns[i]], gelu=part,
                counter=place, chain=chain,
            )  # fmt: skip
        return y, h, act
    y = _scaled_product(x, stacked(weights).T, weight_scale)
    if gelu and adapted == [0] and len(ups) == 1 and dispatch.runs_triton(x):
        act = dispatch.empty(*y.shape, like=x)
        gemm(h, ups[0], scale=scales[0], out=y, add=True, gelu=act)
        return y, h, act
    if _alike(ups, scales):
        parts = len(ups)
        b = stacked(ups).unflatten(0, (parts, -1)).transpose(1, 2)  # [parts, R, N]
        by_part(y, parts).baddbmm_(by_part(h, parts), b, alpha=scales[0])
    else:
        for i in adapted:
            assert h is not None
            y[:, columns[i]].addmm_(h[:, ranks[i]], ups[i].T, alpha=scales[i])
    return y, h, gelu_forward(y) if gelu else None


def _scaled_product(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """scale·x w by the library."""
    return x @ w if scale == 1.0 else library_product(x, w, scale, x.dtype)


def _times(h: Tensor, ranks: Sequence[slice], factors: Sequence[Tensor | None] | None) -> Tensor:
    """h [M, ΣR] with the columns of each part multiplied by its factors, in place."""
    for columns, factor in zip(ranks, factors or (), strict=False):
        if factor is not None:
            h[:, columns] *= factor
    return h


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    *,
    factors: Sequence[Tensor | None] | None = None,
    gelu_input: Tensor | None = None,
    needs_x: bool = True,
    dtype: torch.dtype | None = None,
    weight_scale: float = 1.0,
    counter: tuple[Tensor, int] | None = None,
    implementation: str = "auto",
    chain: int | None = None,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """(dx, dA of every part, dB of every part); parts without adapter get empty gradients.

    Args:
        dy: [M, ΣN]. The others as given to, or returned by, the forward.
        x: [M, K]; None without adapters, or with `gelu_input`.
        gelu_input: [M, K], the pre-activation whose gelu is x: dx is then its gradient.
        needs_x: compute dx.
        dtype: of dA and dB; that of the adapters when None.
        counter: not used: a gradient that float16 cannot hold becomes infinite, which is how the
            loss scale finds that it is too high.
    """
    chain = chain_of(dy, chain)
    triton = uses_triton(dy, implementation, chain)
    columns, ranks, adapted = _places(weights, downs)
    dtype = dtype or downs[0].dtype
    # The gradients of dA are rows of one product, made below.
    d_downs = [a if i in adapted else a.to(dtype) for i, a in enumerate(downs)]
    product = gemm_product if triton else library_product
    # dB reads h, which holds the factors; dA and dx read g, which must get them here.
    g = dispatch.empty(dy.shape[0], ranks[-1].stop, like=dy)
    if not triton and _alike(ups, scales):
        parts = len(ups)
        b, dys = stacked(ups).unflatten(0, (parts, -1)), by_part(dy, parts)
        product(dys, b, scales[0], dy.dtype, by_part(g, parts))
        d_ups = list(product(dys.mT, by_part(h, parts), scales[0], dtype))
    else:
        d_ups = [b if i in adapted else b.to(dtype) for i, b in enumerate(ups)]
        for i in adapted:
            part = dy[:, columns[i]]
            assert h is not None
            product(part, ups[i], scales[i], dy.dtype, g[:, ranks[i]])
            d_ups[i] = product(part.T, h[:, ranks[i]], scales[i], dtype)
    _times(g, ranks, factors)
    dx = act = None
    if needs_x:
        a = stacked([downs[i] for i in adapted]) if adapted else None
        # gelu(gelu_input), for the adapter's gradient, is written where gelu_input is read anyway.
        # In the epilogue of the full product that would take more registers than there are.
        if adapted and x is None and gelu_input is not None and not triton:
            act = dispatch.empty(*gelu_input.shape, like=dy)
        dx = _backward_x(dy, stacked(weights), g, a, gelu_input, act, weight_scale, triton, chain)
    if adapted:
        if x is None:
            x = gelu_forward(gelu_input) if act is None else act
        d_a = product(g.T, x, 1.0, dtype)
        for i in adapted:
            d_downs[i] = d_a[ranks[i]]
    return dx, d_downs, d_ups


def _backward_x(
    dy: Tensor,
    w: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    gelu_input: Tensor | None,
    act: Tensor | None,
    weight_scale: float,
    triton: bool,
    chain: int,
) -> Tensor:
    """weight_scale·dy w + g a, times gelu' of `gelu_input` if given.

    gelu of that goes into `act` if given.
    """
    if triton:
        adapter = None if a is None else (g, a.T, 1.0)
        return gemm(dy, w.T, adapter=adapter, scale=weight_scale, gelu_grad=gelu_input, chain=chain)
    dx = _scaled_product(dy, w, weight_scale)
    if gelu_input is None:
        return dx if a is None else dx.addmm_(g, a)
    if a is not None and dispatch.runs_triton(dy):
        return gemm(g, a.T, out=dx, add=True, gelu=act, gelu_grad=gelu_input)
    if act is not None:
        act.copy_(gelu_forward(gelu_input))
    return gelu_backward(dx if a is None else dx.addmm_(g, a), gelu_input)


@torch.library.custom_op("anima_fast::lora_linear", mutates_args=())
def _op(
    x: Tensor,
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    implementation: str,
    chain: int,
) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    downs, ups = ([t.to(x.dtype) for t in ts] for ts in (downs, ups))
    y, h, _ = lora_linear_forward(
        flat, weights, downs, ups, scales, implementation=implementation, chain=chain
    )
    h = x.new_empty(len(flat), 0) if h is None else h
    return y.view(*x.shape[:-1], -1), h


@_op.register_fake
def _(x, weights, downs, ups, scales, implementation, chain):
    tokens = x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-1], sum(len(w) for w in weights)))
    return y, x.new_empty((tokens, sum(len(a) for a in downs)))


@torch.library.custom_op("anima_fast::lora_linear_backward", mutates_args=())
def _op_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    implementation: str,
    chain: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    flat = x.reshape(-1, x.shape[-1])
    dx, d_downs, d_ups = lora_linear_backward(
        dy.reshape(len(flat), -1),
        flat,
        h,
        weights,
        [t.to(x.dtype) for t in downs],
        [t.to(x.dtype) for t in ups],
        scales,
        dtype=downs[0].dtype,
        implementation=implementation,
        chain=chain,
    )
    assert dx is not None
    # Results of a custom op must not share memory.
    return dx.view(x.shape), [d.clone() for d in d_downs], [d.clone() for d in d_ups]


@_op_backward.register_fake
def _(dy, x, h, weights, downs, ups, scales, implementation, chain):
    new = [[t.new_empty(t.shape, dtype=downs[0].dtype) for t in ts] for ts in (downs, ups)]
    return x.new_empty(x.shape), *new


def _setup(ctx, inputs, output) -> None:
    x, weights, downs, ups, ctx.scales, *ctx.options = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, output[1], *weights, *downs, *ups)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor | None, _dh: Tensor | None) -> tuple:
    n = ctx.count
    if dy is None:
        return None, [None] * n, [None] * n, [None] * n, None, None, None
    x, h, *rest = ctx.saved_tensors
    parts = [rest[i * n : (i + 1) * n] for i in range(3)]
    dx, d_downs, d_ups = _op_backward(dy, x, h, *parts, ctx.scales, *ctx.options)
    return dx, [None] * n, d_downs, d_ups, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    implementation: str = "auto",
    chain: int | None = None,
) -> Tensor:
    """Frozen linear layers on one input, each with an adapter or none, side by side.

    Args:
        x: [..., K], fp32, fp16 or bf16.
        weights: [N_i, K] each, in x's dtype; they get no gradient.
        downs: [R_i, K] each; R_i = 0 where a layer has no adapter. Any float dtype.
        ups: [N_i, R_i] each, in the dtype of `downs`.
        scales: s_i each, alpha / rank times any strength.
        implementation: auto, triton or cublas (module docstring).
        chain: terms that float16 sums at a time, 0 for float32 sums; None as `use_sums` says.

    Returns:
        [..., ΣN] in x's dtype.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or counts that do not fit.
    """
    counts = {len(weights), len(downs), len(ups), len(scales)}
    if len(counts) != 1 or not weights:
        raise ValueError(
            f"weights, downs, ups and scales are {len(weights)}, {len(downs)}, {len(ups)} and "
            f"{len(scales)}, expected one of each per layer"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    if x.ndim < 2:
        raise ValueError(f"x is {tuple(x.shape)}, expected [..., K] with at least two dimensions")
    dispatch.check_dtypes(x=x)
    k = x.shape[-1]
    for i, (w, a, b) in enumerate(zip(weights, downs, ups, strict=True)):
        if w.ndim != 2 or w.shape[1] != k or w.dtype != x.dtype:
            raise ValueError(
                f"weights[{i}] is {tuple(w.shape)} {w.dtype}, expected [N, K] with K = {k} in x's "
                f"{x.dtype}"
            )
        if a.ndim != 2:
            raise ValueError(f"downs[{i}] is {tuple(a.shape)}, expected [R, K]")
        dispatch.check_shape(f"downs[{i}]", a, "[R, K]", (len(a), k))
        dispatch.check_shape(f"ups[{i}]", b, "[N, R]", (len(w), len(a)))
        tensors = {"x": x, f"weights[{i}]": w, f"downs[{i}]": a, f"ups[{i}]": b}
        dispatch.check_dtypes(**tensors)
        dispatch.check_devices(**tensors)
        if a.dtype != downs[0].dtype or b.dtype != downs[0].dtype:
            raise TypeError(f"downs and ups of part {i} are {a.dtype} and {b.dtype}: use one dtype")
    layers = [list(weights), list(downs), list(ups), list(map(float, scales))]
    return _op(x, *layers, implementation, chain_of(x, chain))[0]


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    m, n, k, r, parts = (sizes[name] for name in ("M", "N", "K", "R", "parts"))
    ranks = [r * (1 + i % 2) if i or not sizes.get("bare") else 0 for i in range(parts)]
    if sizes.get("equal"):
        ranks = [r] * parts

    def matrix(rows: int, columns: int) -> Tensor:
        return randn(rows, columns, dtype=dtype, device=device) / max(1, columns) ** 0.5

    return {
        "x": randn(m, k, dtype=dtype, device=device),
        "weights": [matrix(n, k) for _ in range(parts)],
        "downs": [matrix(rank, k) for rank in ranks],
        "ups": [matrix(n, rank) for rank in ranks],
        "scales": [0.5 if sizes.get("equal") else 0.5 + i for i in range(parts)],
        "implementation": "cublas" if sizes.get("cublas") else "auto",
    }


def _cost(sizes: Sizes, itemsize: int) -> Cost:
    m, n, k, r, parts = (sizes[name] for name in ("M", "N", "K", "R", "parts"))
    base, adapter = 2 * m * k * n * parts, 2 * m * r * (k + n) * parts
    tokens, weights = m * (k + n * parts), k * n * parts + r * (k + n) * parts
    return Cost(
        forward_bytes=(tokens + weights) * itemsize,
        backward_bytes=(tokens + weights + m * k) * itemsize,
        forward_flops=base + adapter,
        backward_flops=base + 2 * adapter,
    )


def _real_shapes(tokens: int) -> dict[str, Sizes]:
    one = {"M": tokens, "R": 32, "parts": 1, "equal": 1}
    return {
        "qkv": {**one, "N": 2048, "K": 2048, "parts": 3},
        "out": {**one, "N": 2048, "K": 2048},
        "text kv": {**one, "M": 96, "N": 2048, "K": 1024, "parts": 2},
        "up": {**one, "N": 8192, "K": 2048},
        "down": {**one, "N": 2048, "K": 8192},
    }


OP = Op(
    name="lora_linear",
    function=lora_linear,
    reference=lora_linear_reference,
    make_inputs=_inputs,
    grads=("x", "downs", "ups"),
    shapes=(
        {"M": 1, "N": 1, "K": 1, "R": 1, "parts": 1},
        {"M": 5, "N": 7, "K": 9, "R": 3, "parts": 3, "bare": 1},
        {"M": 130, "N": 70, "K": 65, "R": 20, "parts": 2},
        {"M": 1100, "N": 40, "K": 33, "R": 4, "parts": 1},
        {"M": 33, "N": 24, "K": 40, "R": 8, "parts": 3, "cublas": 1},
        {"M": 35, "N": 26, "K": 44, "R": 5, "parts": 3, "cublas": 1, "equal": 1},
    ),
    model_shapes=(
        {"M": 16, "N": 32, "K": 2048, "R": 32, "parts": 1},
        {"M": 16, "N": 32, "K": 8192, "R": 32, "parts": 1},
        {"M": 16, "N": 2048, "K": 40, "R": 32, "parts": 1},
        {"M": 4096, "N": 16, "K": 24, "R": 8, "parts": 1},
        {"M": 16, "N": 32, "K": 2048, "R": 32, "parts": 3, "cublas": 1, "equal": 1},
    ),
    # y sums K, dx N·parts, dA and dB the tokens.
    summed=lambda sizes: max(sizes["K"], sizes["N"] * sizes["parts"], sizes["M"]),
    real_shapes=_real_shapes,
    cost=_cost,
    cost_note="read x, W, A, B, write y; backward reads x and dy, writes dx",
)
SHORT = with_short_sums(
    OP,
    shapes=(
        {"M": 130, "N": 70, "K": 65, "R": 20, "parts": 2, "bare": 1},
        {"M": 33, "N": 24, "K": 140, "R": 8, "parts": 2},
        {"M": 70, "N": 200, "K": 40, "R": 5, "parts": 1},
    ),
    model_shapes=(
        {"M": 16, "N": 32, "K": 8192, "R": 32, "parts": 1},
        {"M": 70, "N": 2048, "K": 136, "R": 32, "parts": 1},
    ),
)
