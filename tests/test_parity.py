"""The parity harness finds what it is for, and its command says so."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from anima_fast.bench import parity
from anima_fast.cli import app
from anima_fast.kernels import dispatch
from anima_fast.kernels.op import Cost, Op
from anima_fast.kernels.registry import OPS


def double(x):
    return 2 * x


def make_op(function):
    return Op(
        name="double",
        function=function,
        reference=double,
        make_inputs=lambda sizes, dtype, device: {
            "x": torch.randn(sizes["M"], 5, dtype=torch.float64).to(dtype).to(device)
        },
        grads=("x",),
        shapes=({"M": 3},),
        real_shapes=lambda tokens: {"": {"M": tokens}},
        cost=lambda sizes, itemsize: Cost(1, 1),
    )


class Doubled(torch.autograd.Function):
    """2 x through memory from `dispatch.empty`, with room for mistakes."""

    mistake = None

    @staticmethod
    def forward(ctx, x):
        out = dispatch.empty(*x.shape, like=x)
        flat = out.view(-1)
        if Doubled.mistake == "out of bounds":
            torch.as_strided(flat, (1,), (1,), flat.storage_offset() + flat.numel()).fill_(0)
        if Doubled.mistake == "reads the gap":
            x = x.as_strided(x.shape, (x.shape[1], 1), x.storage_offset())
        out.copy_(2 * x)
        if Doubled.mistake == "left out":
            return dispatch.empty(*x.shape, like=x).copy_(out).index_fill_(0, torch.tensor(2), 0)
        if Doubled.mistake == "unwritten":
            fresh = dispatch.empty(*x.shape, like=x)
            fresh[:2] = out[:2]
            return fresh
        if Doubled.mistake == "integer":
            return out.double()
        return out

    @staticmethod
    def backward(ctx, dout):
        return dout * (2.1 if Doubled.mistake == "gradient" else 2)


@pytest.mark.parametrize(
    "mistake, layout, tensors",
    [
        (None, "plain", set()),
        (None, "strided", set()),
        (None, "expanded", set()),
        ("out of bounds", "plain", {"out", "dx"}),
        ("reads the gap", "strided", {"out"}),
        ("left out", "plain", {"out"}),
        ("unwritten", "plain", {"out"}),
        ("integer", "plain", {"out", "dx"}),
        ("gradient", "plain", {"dx"}),
    ],
)
def test_mistakes_are_found(mistake, layout, tensors, monkeypatch):
    monkeypatch.setattr(Doubled, "mistake", mistake)
    op = make_op(lambda x: Doubled.apply(x))
    checks = parity.check_op(op, {"M": 3}, torch.float32, layout=layout)
    assert {c.tensor for c in checks} == {"out", "dx"}
    failed = {c.tensor for c in checks if not c.passed}
    # A remark about the whole run stands at what comes after it, too.
    assert failed >= tensors if tensors else not failed
    if mistake == "out of bounds":
        assert all(c.remark == "wrote out of bounds" for c in checks)
    if mistake == "unwritten":
        assert next(c for c in checks if c.tensor == "out").error == float("inf")


def test_the_rule_is_twice_the_reference_error():
    slightly = lambda x: 2 * x * (1 + 3e-3)  # noqa: E731
    for dtype, passes in ((torch.float32, False), (torch.bfloat16, False)):
        checks = parity.check_op(make_op(slightly), {"M": 3}, dtype)
        assert all(c.allowed == 2 * c.reference_error + parity.FLOORS[dtype] for c in checks)
        assert next(c.passed for c in checks if c.tensor == "out") == passes


def test_the_command_prints_a_table_and_json():
    run = CliRunner().invoke(app, ["parity", "--op", "gate_residual"])
    assert run.exit_code == 0, run.output
    assert "checks passed" in run.output and "interpreted" in run.output
    run = CliRunner().invoke(app, ["parity", "--op", "gate_residual", "--json"])
    records = json.loads(run.output)
    op = OPS["gate_residual"]
    tensors = 1 + len(op.grads)
    assert len(records) == len(op.shapes) * len(op.dtypes) * len(parity.LAYOUTS) * tensors
    assert all(r["passed"] and r["error"] <= r["allowed"] for r in records)


def test_the_command_ends_with_one_when_a_kernel_is_wrong(monkeypatch):
    wrong = dataclasses.replace(OPS["gelu"], function=lambda a: OPS["gelu"].reference(a) * 1.1)
    monkeypatch.setitem(OPS, "gelu", wrong)
    run = CliRunner().invoke(app, ["parity", "--op", "gelu"])
    assert run.exit_code == 1
    assert "FAILED gelu float32" in run.output


def test_an_unknown_op_is_one_line_and_status_two():
    run = CliRunner().invoke(app, ["parity", "--op", "fast"])
    assert run.exit_code == 2 and "--op fast is unknown: use one of" in run.output
