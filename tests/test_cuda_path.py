"""What the fused block calls on a card, without a card: needs a CUDA build of PyTorch, no driver.

Fake tensors of device cuda go through the block's forward and backward; Triton launches are left
out. That proves the operators that exist on CUDA only (products with float32 results, flash
attention with its log-sum-exp and backward) against the PyTorch at hand: their names, arguments,
shapes and dtypes. Values are for tests marked gpu.
"""

import itertools
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from anima_fast.models import fused_attention
from anima_fast.models.attention import ZeroRows
from anima_fast.models.block import GROUPS, BlockSettings, FusedBlockFunction

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="this PyTorch is not built for CUDA"
)
B, L, S, D, HEAD, TEXT, RANK = 2, 100, 77, 256, 128, 64, 8
SIZES = {"qkv": (D, D), "out": (D, D), "cross_q": (D, D), "cross_kv": (TEXT, D),
         "cross_out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}  # fmt: skip


class Context:
    """What autograd gives a Function; its engine would want a driver."""

    def __init__(self, tensors):
        self.needs_input_grad = (
            False,
            False,
            *(x is not None and x.requires_grad for x in tensors),
        )

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def make_tensors(adapters_dtype):
    def new(*shape, dtype=torch.bfloat16, trained=False):
        return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=trained)

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
    monkeypatch.setattr(fused_attention, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return found


# Who computes self and cross attention: by the option, what PyTorch prefers and is built with.
ATTENTIONS = {
    "flash": ("torch", SDPBackend.FLASH_ATTENTION, True, {"flash": 2}),
    "cudnn": ("torch", SDPBackend.CUDNN_ATTENTION, True, {"cudnn": 1, "flash": 1}),
    "windows": ("torch", SDPBackend.EFFICIENT_ATTENTION, False, {"triton": 2}),
    "cudnn alone": ("torch", SDPBackend.CUDNN_ATTENTION, False, {"cudnn": 1, "triton": 1}),
    "triton": ("triton", SDPBackend.CUDNN_ATTENTION, True, {"triton": 2}),
}


@pytest.mark.parametrize(
    "policy, attentions, adapters_dtype",
    itertools.product(("none", "mlp", "block"), ATTENTIONS, (torch.float32, torch.bfloat16)),
)
def test_operators_of_the_fused_block_exist(
    launches, monkeypatch, policy, attentions, adapters_dtype
):
    attn_mode, choice, has_flash, expected = ATTENTIONS[attentions]
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: choice.value)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: has_flash)
    with FakeTensorMode(), torch.no_grad(), Operators() as operators:
        tensors = make_tensors(adapters_dtype)
        counts = torch.empty(B, dtype=torch.int32, device="cuda")
        settings = BlockSettings(
            policy=policy, attn_mode=attn_mode, dtype=torch.bfloat16, head_dim=HEAD,
            scales={group: [0.5] * len(layers) for group, layers in GROUPS.items()},
            rows=ZeroRows((512 - S, 9), counts, counts),
        )  # fmt: skip
        ctx = Context(tensors.values())
        out = FusedBlockFunction.forward(ctx, settings, list(tensors), *tensors.values())
        grads = FusedBlockFunction.backward(ctx, torch.empty_like(out))
        assert out.shape == (B, L, D) and out.dtype == torch.bfloat16
        for (name, x), grad in zip(tensors.items(), grads[2:], strict=True):
            if x is not None and x.requires_grad:
                assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device), name
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
