"""Ops that no card should run: one spills, one wants too much shared memory, one does not compile.

Run as a program, it prints what `bench.resources` finds of them, as JSON; with the word `quick` or
`all`, of our own.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent.parent))

from anima_fast.bench.resources import ARCHS, FULL_ARCH, SHORTER, check, measure
from anima_fast.kernels.op import Cost, Op, randn


@triton.jit
def _spill(X, Y, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(X + o)
    y = tl.load(X + N + o)
    # Both rows stay alive across the sums: far more values than registers are allowed.
    tl.store(Y + o, x * tl.sum(y, 0) + y * tl.sum(x, 0))


@triton.jit
def _greed(X, Y, STEPS, N: tl.constexpr):
    o = tl.arange(0, N)
    tile = o[:, None] * N + o[None, :]
    total = tl.zeros([N, N], dtype=tl.float32)
    for step in range(STEPS):
        a = tl.load(X + step * N * N + tile)
        b = tl.load(Y + step * N * N + tile)
        total = tl.dot(a, b, total)
    tl.store(X + tile, total)


@triton.jit
def _broken(X):
    tl.static_assert(False, "never compiles")


def spill(x):
    y = torch.empty_like(x)
    _spill[(1,)](x, y, N=4096, num_warps=1, maxnreg=32)
    return y


def greed(x):
    _greed[(1, 70000)](x, x, 8, N=128, num_warps=8, num_stages=4)
    return x


def broken(x):
    _broken[(1,)](x)
    return x


GREEDY = {
    function.__name__: Op(
        name=function.__name__,
        function=function,
        reference=function,
        make_inputs=lambda sizes, dtype, device: {"x": randn(1 << 18, dtype=dtype, device=device)},
        grads=(),
        shapes=(),
        real_shapes=lambda tokens: {"": {}},
        cost=lambda sizes, itemsize: Cost(0, 0),
        dtypes=(torch.bfloat16,),
    )
    for function in (spill, greed, broken)
}

if __name__ == "__main__":
    words = sys.argv[1:]
    quick = words == ["quick"]
    rows = measure(quick=quick) if words else measure(ops=GREEDY, archs=(FULL_ARCH,))
    if words:
        rows += measure(ops=SHORTER, archs=(FULL_ARCH,) if quick else ARCHS, quick=quick)
    print(json.dumps({"problems": check(rows), "kernels": list(map(asdict, rows))}))
