"""Every op of the registry against its definition, interpreted: values, gradients, bounds."""

import pytest
import torch

from anima_fast.bench.errors import cases
from anima_fast.bench.interpreter import interpreting, start
from anima_fast.bench.parity import check_op, leaves, map_tensors
from anima_fast.kernels import dispatch
from anima_fast.kernels.registry import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if interpreting():
    start()


def parity_cases(op):
    """Small shapes in every dtype and layout; of float64 and the model's shapes the quick ones."""
    quick = [case for case in cases(op, quick=True)
             if case[1] == torch.float64 or case[0] in op.model_shapes]  # fmt: skip
    small = [case for case in cases(op) if case[1] != torch.float64 and case[0] in op.shapes]
    for sizes, dtype, layout in (*small, *quick):
        text = " ".join(f"{k}{v}" for k, v in sizes.items())
        yield pytest.param(
            op, sizes, dtype, layout, id=f"{op.name}-{text}-{str(dtype)[6:]}-{layout}"
        )


CASES = [case for op in OPS.values() for case in parity_cases(op)]


@pytest.mark.parametrize("op, sizes, dtype, layout", CASES)
def test_parity(op, sizes, dtype, layout):
    checks = check_op(op, sizes, dtype, layout=layout, device=DEVICE)
    wrong = [str(check) for check in checks if not check.passed]
    assert not wrong, "; ".join(wrong)


# With short sums an op is the same function but for float16.
WIDE = [op for op in OPS.values() if not op.of_half]
DIFFERENTIABLE = [op for op in WIDE if op.grads]


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_gradcheck(op):
    """The kernel's backward is the derivative of the kernel's forward, in float64."""
    torch.manual_seed(1)
    sizes = min(op.shapes[1:], key=lambda s: torch.Size(s.values()).numel())
    inputs = op.make_inputs(sizes, torch.float64, DEVICE)
    names = list(leaves(inputs, op.grads))
    tensors = [t.detach().requires_grad_() for t in leaves(inputs, op.grads).values()]

    def function(*values):
        given = dict(zip(names, values, strict=True))
        call = dict(inputs)
        for name in op.grads:
            value = inputs[name]
            call[name] = (
                [given.get(f"{name}[{i}]", value[i]) for i in range(len(value))]
                if isinstance(value, list)
                else given[name]
            )
        out = op.function(**call)
        outs = out if isinstance(out, tuple) else (out,)
        return tuple(o for o in outs if o.requires_grad)

    with dispatch.use("triton"):
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_compiles_without_graph_break(op):
    """The op is one node of a compiled graph, forward and backward."""
    torch.manual_seed(2)
    inputs = op.make_inputs(op.shapes[1], torch.float32, DEVICE)
    inputs = {k: map_tensors(v, lambda x: x.requires_grad_()) for k, v in inputs.items()}
    plain = op.function(**inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: op.function(**kw), fullgraph=True, backend="aot_eager")
    found = compiled(inputs)
    wanted = plain if isinstance(plain, tuple) else (plain,)
    found = found if isinstance(found, tuple) else (found,)
    wrt = list(leaves(inputs, op.grads).values())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad([o.sum() for o in found if o.requires_grad], wrt),
        torch.autograd.grad([o.sum() for o in wanted if o.requires_grad], wrt),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the custom ops of the project that run."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "anima_fast":
            self.found.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", WIDE, ids=lambda op: op.name)
def test_custom_ops_keep_their_contract(op):
    """Schema, fake tensors and registration of the forward's and the backward's operator."""
    torch.manual_seed(3)
    inputs = op.make_inputs(op.shapes[1], torch.float32, DEVICE)
    wrt = list(leaves(inputs, op.grads).values())
    for leaf in wrt:
        leaf.requires_grad_()
    with Calls() as calls:
        out = op.function(**inputs)
        outs = out if isinstance(out, tuple) else (out,)
        if wrt:
            upstream = [torch.randn_like(o) for o in outs]
            torch.autograd.grad(outs, wrt, upstream)
    names = [function.name() for function, _, _ in calls.found]
    assert len(calls.found) >= (2 if wrt else 1), names
    detached = lambda x: map_tensors(x, torch.Tensor.detach)  # noqa: E731
    for function, args, kwargs in calls.found:
        torch.library.opcheck(
            function,
            tuple(detached(a) for a in args),
            kwargs,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
