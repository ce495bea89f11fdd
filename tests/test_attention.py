"""Attention with zero rows against written-out rows, and the wiring of the other backends."""

import math
import sys
import types

import pytest
import torch

from anima_fast.device import check_torch_version
from anima_fast.errors import UserError
from anima_fast.models import attention as attention_module
from anima_fast.models.attention import attention, check_attn_mode, prepare_zero_rows, zero_logits


def make_qkv(dtype=torch.float32, batch=2, length=6, rows=5, heads=3, dim=16):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, length, heads, dim, generator=generator)
    k, v = torch.randn(2, batch, rows, heads, dim, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def plain_softmax(q, k, v, counts):
    """The definition: e^{s} v over the keys, n added to the denominator; in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    weights = torch.einsum("blhk,bshk->bhls", q, k).div(math.sqrt(q.shape[-1])).exp()
    n = torch.tensor(counts, dtype=torch.float64)[:, None, None, None]
    return torch.einsum("bhls,bshk->blhk", weights / (weights.sum(-1, keepdim=True) + n), v)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "zero_keys", [None, 0, 507, [0, 0], [4, 507], (0, 3), torch.tensor([500, 1])]
)
def test_zero_keys_are_exact(zero_keys, split):
    q, k, v = make_qkv()
    counts = [0, 0] if zero_keys is None else torch.as_tensor(zero_keys).expand(2).tolist()
    out = attention(q, k, v, zero_keys=zero_keys, split=split)
    expected = plain_softmax(q, k, v, counts)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 100, 257, 490, 511, 4096])
def test_logits_stand_for_the_count(count, dtype):
    logits = zero_logits(count, dtype)
    assert torch.tensor(logits, dtype=dtype).double().exp().sum().item() == pytest.approx(
        count, rel=2e-5
    )


def test_half_precision_is_not_off_by_the_rounding_of_the_logit():
    """log(490) rounded to bfloat16 alone would scale the result by 0.4 %."""
    q, k, v = make_qkv(torch.bfloat16, batch=8, length=64, rows=20)
    out = attention(q, k, v, zero_keys=490)
    expected = plain_softmax(q, k, v, [490] * 8)
    scale = (out.double() * expected).sum() / expected.square().sum()
    assert abs(scale - 1) < 5e-4


def test_no_zero_keys_takes_the_plain_path(monkeypatch):
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        masks.append(attn_mask)
        return real(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", spy)
    q, k, v = make_qkv()
    for zero_keys in (None, 0, [0, 0], torch.zeros(2, dtype=torch.long)):
        attention(q, k, v, zero_keys=zero_keys)
    assert masks == [None] * 4
    attention(q, k, v, zero_keys=[0, 1])
    # Never as large as queries times keys.
    assert masks[-1].shape == (2, 1, 1, k.shape[1] + 1)


def test_prepared_rows_give_the_same():
    q, k, v = make_qkv()
    rows = prepare_zero_rows([3, 0], 2, q.dtype, q.device)
    for split in (False, True):
        prepared = attention(q, k, v, zero_keys=rows, split=split)
        torch.testing.assert_close(prepared, attention(q, k, v, zero_keys=[3, 0]))


@pytest.mark.parametrize("zero_keys", [-5, [1], [1, 2, 3], [1, -9]])
def test_wrong_counts(zero_keys):
    with pytest.raises(ValueError, match="zero_keys"):
        attention(*make_qkv(), zero_keys=zero_keys)


def test_unknown_mode():
    with pytest.raises(ValueError, match="attention mode 'fast'"):
        attention(*make_qkv(), mode="fast")


def softmax_attention(q, k, v):
    """[B, L, H, K] attention in plain torch."""
    weights = torch.einsum("blhk,bshk->bhls", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhls,bshk->blhk", weights, v)


@pytest.fixture
def packages(monkeypatch):
    """flash_attn, xformers and sageattention in torch, with the packages' own signatures."""
    calls = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, causal, return_attn_probs) == (0.0, None, False, False)
        calls.append(("flash", q.shape, k.shape))
        return softmax_attention(q, k, v)

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert (attn_bias, p, scale) == (None, 0.0, None)
        calls.append(("xformers", query.shape, key.shape))
        return softmax_attention(query, key, value)

    def sageattn(
        q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs
    ):
        assert (is_causal, sm_scale, return_lse, kwargs) == (False, None, False, {})
        calls.append(("sageattn", q.shape, k.shape))
        if tensor_layout == "NHD":
            return softmax_attention(q, k, v)
        return softmax_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    modules = {
        "flash_attn": {"flash_attn_func": flash_attn_func},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "sageattention": {"sageattn": sageattn},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("mode", ["flash", "xformers", "sageattn"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("zero_keys", [None, 30, [30, 30], [0, 30]])
def test_backends_equal_torch(packages, mode, split, zero_keys):
    q, k, v = make_qkv()
    found = attention(q, k, v, zero_keys=zero_keys, mode=mode, split=split)
    expected = attention(q, k, v, zero_keys=zero_keys)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert {call[0] for call in packages} == {mode}
    # One call when the counts are equal, else sample by sample.
    assert len(packages) == (2 if split or zero_keys == [0, 30] else 1)
    counts = torch.as_tensor(zero_keys or 0).expand(2).tolist()
    assert [call[2][1] for call in packages] == [5 + n for n in counts][-len(packages) :]
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["flash", "xformers", "sageattn"])
def test_the_dit_uses_the_backend(packages, mode):
    from tiny_dit import TINY, make_dit, make_inputs

    inputs = make_inputs()
    out = make_dit(attn_mode=mode)(*inputs, zero_keys=[10, 2])
    assert len(packages) == TINY.num_blocks * 3
    torch.testing.assert_close(out, make_dit()(*inputs, zero_keys=[10, 2]), atol=1e-5, rtol=1e-5)


def test_split_attn_of_the_dit():
    from tiny_dit import make_dit, make_inputs

    inputs = make_inputs()
    dit = make_dit()
    expected = dit(*inputs, zero_keys=[10, 2])
    dit.split_attn = True
    torch.testing.assert_close(dit(*inputs, zero_keys=[10, 2]), expected)


def test_modes_that_are_refused(packages):
    check_attn_mode("torch", training=True, device="cpu", dtype=torch.float32)
    check_attn_mode("sdpa", training=True, device="cpu")
    check_attn_mode("sageattn", training=False, device="cuda", dtype=torch.bfloat16)
    check_attn_mode("flash", training=True)
    check_attn_mode("xformers", training=True, device="cuda:0", dtype=torch.float32)
    with pytest.raises(UserError, match="sageattn has no backward"):
        check_attn_mode("sageattn", training=True)
    with pytest.raises(UserError, match="unknown"):
        check_attn_mode("fast", training=False)
    with pytest.raises(UserError, match="16 bit only"):
        check_attn_mode("flash", training=True, device="cuda", dtype=torch.float32)
    for mode in ("flash", "xformers", "sageattn"):
        with pytest.raises(UserError, match="needs a CUDA card"):
            check_attn_mode(mode, training=False, device="cpu")


@pytest.mark.parametrize(
    ("mode", "extra"), [("flash", "flash"), ("xformers", "xformers"), ("sageattn", "sage")]
)
def test_a_missing_package_names_the_extra(mode, extra, monkeypatch):
    package = attention_module.LIBRARIES[mode].package
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install \"anima-fast\[{extra}\]\""):
        check_attn_mode(mode, training=False)


def test_old_torch():
    check_torch_version()
    for version in ("2.5.0", "2.13.0+cpu", "3.0.0a0+git123"):
        check_torch_version(version)
    for version in ("2.4.1", "2.4.1+cu121", "1.13.1"):
        with pytest.raises(UserError, match="NaN"):
            check_torch_version(version)


def test_one_program_sums_all_queries(monkeypatch):
    """As on a card with many heads: dk and dv are float32 sums over tile after tile of queries."""
    from anima_fast.bench.parity import check_op
    from anima_fast.kernels import attention as module

    monkeypatch.setattr(module, "PROGRAMS", 1)
    sizes = {"B": 1, "L": 650, "S": 20, "H": 1, "K": 32}
    checks = {c.tensor: c for c in check_op(module.OP, sizes, torch.bfloat16)}
    for tensor in ("dk", "dv"):
        assert checks[tensor].error < 1.1 * checks[tensor].reference_error
