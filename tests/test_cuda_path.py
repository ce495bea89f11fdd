"""What the fused block calls on a card, with any build of PyTorch.

Tensors of the meta device that pretend to be on a card go through the block's forward and backward;
Triton launches are left out. That proves the operators that exist on CUDA only (products with
float32 results, flash attention with its log-sum-exp and backward) against the PyTorch at hand:
their names, arguments, shapes and dtypes. Values are for tests marked gpu.
"""

import itertools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from anima_fast.bench.pretend import Card, pretended
from anima_fast.models.attention import ZeroRows
from anima_fast.models.block import GROUPS, BlockSettings, FusedBlockFunction

B, L, S, D, HEAD, TEXT, RANK = 2, 100, 77, 256, 128, 64, 8
SIZES = {"qkv": (D, D), "out": (D, D), "cross_q": (D, D), "cross_kv": (TEXT, D),
         "cross_out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}  # fmt: skip


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def make_tensors(adapters_dtype):
    def new(*shape, dtype=torch.bfloat16, trained=False):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)

    half = HEAD // 2
    tensors = {
        "x0": new(B, L, D, trained=True), "context": new(B, S, TEXT),
        "modulation": new(B, 9, D, trained=True), "cos": new(L, half), "sin": new(L, half),
        "norm.self": new(2, HEAD), "norm.cross": new(2, HEAD),
    }  # fmt: skip
    for group, layers in GROUPS.items():
        inputs, outputs = SIZES[group]
        for i in range(len(layers)):
            trained = {"dtype": adapters_dtype, "trained": True}
            tensors[f"weight.{group}.{i}"] = new(outputs, inputs)
            tensors[f"down.{group}.{i}"] = new(RANK, inputs, **trained)
            tensors[f"up.{group}.{i}"] = new(outputs, RANK, **trained)
            tensors[f"factor.{group}.{i}"] = None
    return tensors


@pytest.fixture
def launches(monkeypatch):
    found = Counter()

    def count(kernel, *args, **kwargs):
        found[kernel.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", count)
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda kernel, grid: (
        lambda *args, **kwargs: count(kernel)))  # fmt: skip
    return found


# Who computes self and cross attention: by the option, and by what PyTorch prefers and is built
# with.
ATTENTIONS = {
    "flash": ("torch", Card(89), {"flash": 2}),
    "cudnn": ("torch", Card(90), {"cudnn": 1, "flash": 1}),
    "windows": ("torch", Card(89, flash=False), {"triton": 2}),
    "cudnn alone": ("torch", Card(90, flash=False), {"cudnn": 1, "triton": 1}),
    "before ampere": ("torch", Card(75), {"triton": 2}),
    "triton": ("triton", Card(90), {"triton": 2}),
}


@pytest.mark.parametrize(
    "policy, attentions, adapters_dtype",
    itertools.product(("none", "mlp", "block"), ATTENTIONS, (torch.float32, torch.bfloat16)),
)
def test_operators_of_the_fused_block_exist(launches, policy, attentions, adapters_dtype):
    attn_mode, card, expected = ATTENTIONS[attentions]
    tensors = make_tensors(adapters_dtype)
    counts = torch.empty(B, dtype=torch.int32, device="meta")
    settings = BlockSettings(
        policy=policy, attn_mode=attn_mode, dtype=torch.bfloat16, head_dim=HEAD,
        linear={group: {"scales": [0.5] * len(layers)} for group, layers in GROUPS.items()},
        rows=ZeroRows((512 - S, 9), counts, counts),
    )  # fmt: skip
    with pretended(card), Operators() as operators:
        out = FusedBlockFunction.apply(settings, list(tensors), *tensors.values())
        out.backward(torch.empty_like(out))
    assert out.shape == (B, L, D) and out.dtype == torch.bfloat16
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype), name
    calls = operators.calls
    for product in ("mm", "bmm"):
        assert (calls[f"aten.{product}.dtype"] > 0) == (adapters_dtype == torch.float32)
    found = {
        who: calls[f"aten._scaled_dot_product_{who}_attention_backward.default"]
        for who in ("cudnn", "flash")
    }
    found["triton"] = launches["_attention_bwd_dq"]
    assert {who: count for who, count in found.items() if count} == expected
    assert launches["_qk_norm_rope_bwd"] == 3
