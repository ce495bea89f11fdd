"""What every op of the registry refuses, with a message that names it, before anything runs."""

import re

import pytest
import torch
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.adamw import adamw
from anima_fast.kernels.flow_loss import flow_loss
from anima_fast.kernels.gate_residual import gate_residual
from anima_fast.kernels.gate_residual_layernorm_modulate import gate_residual_layernorm_modulate
from anima_fast.kernels.gelu import gelu
from anima_fast.kernels.layernorm_modulate import layernorm_modulate
from anima_fast.kernels.registry import OPS as ALL
from anima_fast.kernels.rmsnorm import rmsnorm

# Rows with powers are another form of an op's argument: the op itself refuses.
OPS = {name: op for name, op in ALL.items() if not name.endswith("_powers")}


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Every op asks where to run before it launches or computes anything."""

    def refuse(x):
        raise AssertionError("the op went on to run")

    monkeypatch.setattr(dispatch, "runs_triton", refuse)


def valid(op):
    torch.manual_seed(0)
    return op.make_inputs(op.shapes[1], torch.float32, "cpu")


def tensors(op):
    """Names of the arguments that hold tensors, the first of which gives the shapes."""
    return [
        name
        for name, value in valid(op).items()
        if isinstance(value, Tensor) or (isinstance(value, list) and isinstance(value[0], Tensor))
    ]


def changed(inputs, name, change):
    value = inputs[name]
    new = [change(value[0]), *value[1:]] if isinstance(value, list) else change(value)
    return {**inputs, name: new}


def longer(x):
    """One element more in the last dimension; a dimension where there is none."""
    return x[None] if x.ndim == 0 else torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def as_integers(x):
    return x.to(torch.int32) if x.is_floating_point() else x.to(torch.float32)


def names(message, wanted):
    return any(re.search(rf"\b{name}\b", message) for name in wanted)


ARGUMENTS = [pytest.param(op, n, id=f"{op.name}-{n}") for op in OPS.values() for n in tensors(op)]
# One tensor alone can be of any shape and anywhere.
SEVERAL = [case for case in ARGUMENTS if len(tensors(case.values[0])) > 1]


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_valid_arguments_run(op):
    with pytest.raises(AssertionError, match="went on to run"):
        op.function(**valid(op))


@pytest.mark.parametrize("op, name", SEVERAL)
def test_wrong_shape(op, name):
    with pytest.raises(ValueError) as error:
        op.function(**changed(valid(op), name, longer))
    # Where the first argument is the wrong one, it is another that does not fit it.
    first, *_ = everything = tensors(op)
    assert names(str(error.value), everything if name == first else [name])
    assert "expected" in str(error.value)


@pytest.mark.parametrize("op, name", ARGUMENTS)
def test_wrong_dtype(op, name):
    with pytest.raises((TypeError, ValueError)) as error:
        op.function(**changed(valid(op), name, as_integers))
    assert names(str(error.value), [name])
    # The message shows a dtype, not only a shape.
    assert re.search("int32|float32", str(error.value))


@pytest.mark.parametrize("op, name", SEVERAL)
def test_mixed_devices(op, name):
    with pytest.raises(ValueError) as error:
        op.function(**changed(valid(op), name, lambda x: x.to("meta")))
    assert names(str(error.value), [name])
    assert "meta" in str(error.value) and "cpu" in str(error.value)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


ROW = {"x": ones(2, 3, 4), "scale": ones(2, 4), "shift": ones(2, 4)}
SEAM = {**ROW, "y": ones(2, 3, 4), "gate": ones(2, 4)}
GATE = {name: SEAM[name] for name in ("x", "y", "gate")}
NORM = {"x": ones(2, 3, 4), "weight": ones(4)}
STEP = {
    **{name: ones(6) for name in "pgmv"},
    "range_ends": torch.tensor([2, 6]), "lrs": ones(2),
    "step": 1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1,
}  # fmt: skip
LOSS = {"prediction": ones(2, 3, 4, 5), "latents": ones(2, 3, 4, 5), "noise": ones(2, 3, 4, 5)}
HALF, BRAIN = torch.float16, torch.bfloat16

EXPLICIT = [
    (gelu, {}, {"a": ones(2, dtype=torch.int64)}, "a is torch.int64, expected float32, float16 or"),
    (layernorm_modulate, ROW, {"x": ones(3, 4)}, r"x is \(3, 4\), expected \[B, L, D\]"),
    (layernorm_modulate, ROW, {"x": ones(2, 3, 8193)}, "with D from 1 to 8192"),
    (layernorm_modulate, ROW, {"shift": ones(4)}, r"shift is \(4,\), expected \[B, D\] = \(2, 4\)"),
    (gate_residual_layernorm_modulate, SEAM, {"y": ones(2, 1, 4)}, r"y is \(2, 1, 4\), expected"),
    (gate_residual, GATE, {"gate": ones(2, 1, 4)}, r"gate is \(2, 1, 4\), expected \[B, D\]"),
    (gate_residual, GATE, {"y": ones(1, 3, 4)}, r"y is \(1, 3, 4\), expected \[B, L, D\] ="),
    (rmsnorm, NORM, {"x": ones(4)}, r"x is \(4,\), expected \[..., D\]"),
    (rmsnorm, NORM, {"x": ones(2, 0)}, "with D from 1 to 8192"),
    (rmsnorm, NORM, {"weight": ones(1, 4)}, r"weight is \(1, 4\), expected \[D\] = \(4,\)"),
    (adamw, STEP, {"p": ones(2, 3)}, r"p is \(2, 3\), expected \[N\]: flatten it"),
    (adamw, STEP, {"g": ones(5)}, r"g is \(5,\), expected p's \[N\] = \(6,\)"),
    (adamw, STEP, {"g": ones(6, dtype=HALF)}, "g is torch.float16, expected p's torch.float32 or"),
    (adamw, STEP, {"p": ones(6, dtype=BRAIN), "g": ones(6, dtype=HALF)}, "p's torch.bfloat16 or"),
    (adamw, STEP, {"m": ones(6, dtype=BRAIN)}, "m is torch.bfloat16, expected torch.float32"),
    (adamw, STEP, {"v": ones(12)[::2]}, r"v has stride \(2,\), expected dense memory"),
    (adamw, STEP, {"range_ends": torch.tensor([], dtype=torch.int64)}, "range_ends is .*from 1"),
    (adamw, STEP, {"range_ends": torch.tensor([2, 6]).int()}, "range_ends is torch.int32"),
    (adamw, STEP, {"lrs": ones(3)}, r"lrs is \(3,\), expected range_ends' \[n\] = \(2,\)"),
    (adamw, STEP, {"norm": ones(1), "max_norm": 1.0}, r"norm is \(1,\), expected \[\]"),
    (adamw, STEP, {"max_norm": 1.0}, "max_norm is 1.0 and norm is None"),
    (adamw, STEP, {"step": 0}, "step is 0, expected 1 or more"),
    (adamw, STEP, {"beta2": 1.0}, "beta2 is 1.0, expected 0 <= beta2 < 1"),
    (flow_loss, LOSS, {"loss_type": "mse"}, "loss_type is 'mse', expected one of l2, l1, huber"),
    (flow_loss, LOSS, {"loss_type": "huber"}, "c is None: huber needs one threshold per sample"),
    (flow_loss, LOSS, {"prediction": ones(4)}, r"prediction is \(4,\), expected \[B, ...\]"),
    (flow_loss, LOSS, {"noise": ones(2, 3, 4)}, r"noise is \(2, 3, 4\), expected prediction's"),
    (flow_loss, LOSS, {"weights": ones(2, 1)}, r"weights is \(2, 1\), expected \[B\] = \(2,\)"),
    (flow_loss, LOSS, {"c": ones(3)}, r"c is \(3,\), expected \[B\] = \(2,\)"),
    (flow_loss, LOSS, {"cells": ones(2, 3, 4, 5)}, r"cells are \(2, 3, 4, 5\), expected \[B, 1,"),
]  # fmt: skip


@pytest.mark.parametrize("function, given, wrong, message", EXPLICIT)
def test_message(function, given, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        function(**{**given, **wrong})
