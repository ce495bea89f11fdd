"""Optimizers by name: they train, they are as flat and small as promised, they refuse clearly."""

import sys

import pytest
import torch

from anima_fast.errors import UserError
from anima_fast.options.run import TrainOptions
from anima_fast.training.optimizers.build import (
    averaged_weights,
    build_optimizer,
    clip_flat_grad,
    learning_rates,
    train_mode,
)

SHAPES = [(4, 96), (96, 4), (8, 640), (700, 8), (4, 33), (31, 4)]


class FlatNetwork:
    """The flat buffers and views of a LoRA network, in two groups."""

    def __init__(self, shapes=SHAPES, rates=(1e-2, 1e-2), device="cpu"):
        sizes = [rows * columns for rows, columns in shapes]
        generator = torch.Generator().manual_seed(0)
        self.flat = torch.randn(sum(sizes), generator=generator).to(device)
        self.flat_grad = torch.zeros_like(self.flat)
        self.rates, half = rates, sum(sizes[: len(sizes) // 2])
        self.bounds = [(0, half), (half, sum(sizes))]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.pieces = [
            (start, size, shape) for start, size, shape in zip(starts, sizes, shapes, strict=True)
        ]

    def _parameter(self, start, end, shape=(-1,)):
        parameter = torch.nn.Parameter(self.flat[start:end].view(shape))
        parameter.grad = self.flat_grad[start:end].view(shape)
        return parameter

    def param_groups(self, flat=True):
        groups = []
        for index, (start, end) in enumerate(self.bounds):
            params = [self._parameter(start, end)]
            if not flat:
                params = [
                    self._parameter(at, at + size, shape)
                    for at, size, shape in self.pieces
                    if start <= at < end
                ]
            groups.append({"params": params, "lr": self.rates[index], "name": f"group{index}"})
        return groups

    def loss_backward(self):
        """Distance to 0.5, its gradient written to the flat buffer as a backward pass would."""
        self.flat_grad.copy_(self.flat - 0.5)
        return 0.5 * (self.flat - 0.5).square().sum().item()


def options(kind, *arguments, **others):
    return TrainOptions(optimizer_type=kind, optimizer_args=arguments, **others)


def steps(optimizer, network, count):
    for _ in range(count):
        network.loss_backward()
        optimizer.step()


KINDS = {
    "AdamW": (1e-2, ()),
    "AdamW8bit": (1e-2, ()),
    "PagedAdamW": (1e-2, ()),
    "PagedAdamW8bit": (1e-2, ()),
    "PagedAdamW32bit": (1e-2, ()),
    "Lion": (1e-2, ()),
    "Lion8bit": (1e-2, ()),
    "PagedLion8bit": (1e-2, ()),
    "SGDNesterov": (1e-2, ()),
    "SGDNesterov8bit": (1e-2, ()),
    "Prodigy": (1.0, ("d0=1e-3",)),
    "DAdaptation": (1.0, ("d0=1e-3",)),
    "DAdaptAdamPreprint": (1.0, ("d0=1e-3",)),
    "DAdaptAdam": (1.0, ("d0=1e-3",)),
    "DAdaptAdaGrad": (1.0, ("d0=1e-3",)),
    "DAdaptAdan": (1.0, ("d0=1e-3",)),
    "DAdaptAdanIP": (1.0, ("d0=1e-3",)),
    "DAdaptLion": (1.0, ("d0=1e-3",)),
    "DAdaptSGD": (1.0, ("d0=1e-3",)),
    "AdaFactor": (1e-2, ()),
    "RAdamScheduleFree": (1e-1, ()),
    "AdamWScheduleFree": (1e-1, ()),
    "SGDScheduleFree": (1e-1, ()),
    "RMSprop": (1e-2, ()),
    "adamw": (1e-2, ()),
    "torch.optim.NAdam": (1e-2, ()),
    "bitsandbytes.optim.AdEMAMix8bit": (1e-2, ()),
}
PACKAGES = {"Lion": "lion_pytorch", "Prodigy": "prodigyopt", "DAdapt": "dadaptation"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_reduces_a_quadratic(kind):
    for prefix, package in PACKAGES.items():
        if kind.startswith(prefix) and kind != "Lion8bit":
            pytest.importorskip(package)
    if kind.endswith("ScheduleFree"):
        pytest.importorskip("schedulefree")
    rate, arguments = KINDS[kind]
    network = FlatNetwork(rates=(rate, rate))
    optimizer, _ = build_optimizer(
        options(kind, *arguments, learning_rate=rate), network.param_groups
    )
    before = network.loss_backward()
    steps(optimizer, network, 60)
    with averaged_weights(optimizer):
        assert network.loss_backward() < 0.7 * before
    assert torch.isfinite(network.flat).all()


@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit", "PagedAdamW8bit", "SGDNesterov8bit"])
def test_eight_bit_states_of_a_flat_group_are_eight_bit(kind):
    network = FlatNetwork()
    optimizer, _ = build_optimizer(options(kind), network.param_groups)
    steps(optimizer, network, 1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    for group in optimizer.param_groups:
        state = optimizer.state[group["params"][0]]
        numel = group["params"][0].numel()
        states = [state[name] for name in ("state1", "state2") if name in state]
        assert states and all(s.dtype == torch.uint8 and s.numel() == numel for s in states)


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit", "SGDNesterov"])
def test_elementwise_optimizers_take_the_flat_buffer(kind):
    network = FlatNetwork()
    optimizer, _ = build_optimizer(options(kind), network.param_groups)
    shared = {
        param.untyped_storage().data_ptr() for g in optimizer.param_groups for param in g["params"]
    }
    assert shared == {network.flat.untyped_storage().data_ptr()}
    assert [tuple(p.shape) for g in optimizer.param_groups for p in g["params"]] == [
        (end - start,) for start, end in network.bounds
    ]


@pytest.mark.parametrize("kind", ["AdaFactor", "torch.optim.Adafactor", "test_optimizers.Own"])
def test_shape_dependent_and_unknown_optimizers_take_matrices(kind):
    optimizer, _ = build_optimizer(options(kind), FlatNetwork().param_groups)
    shapes = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"]]
    assert shapes == SHAPES


class Own(torch.optim.SGD):
    """An optimizer that only its dotted path knows."""


class NoOptimizer:
    """A class that is none."""


def test_flat_adamw_equals_one_call_per_matrix():
    flat, matrices = FlatNetwork(rates=(1e-2, 3e-3)), FlatNetwork(rates=(1e-2, 3e-3))
    ours, _ = build_optimizer(options("AdamW", "weight_decay=0.1"), flat.param_groups)
    stock = torch.optim.AdamW(matrices.param_groups(flat=False), weight_decay=0.1, fused=True)
    steps(ours, flat, 5)
    steps(stock, matrices, 5)
    assert torch.equal(flat.flat, matrices.flat)


def test_adamw_meets_its_formula():
    network = FlatNetwork(rates=(1e-2, 3e-3))
    optimizer, _ = build_optimizer(
        options("AdamW", "betas=0.8,0.95", "weight_decay=0.1", "eps=1e-6"), network.param_groups
    )
    rate = torch.empty(network.flat.shape, dtype=torch.float64)
    for (start, end), value in zip(network.bounds, network.rates, strict=True):
        rate[start:end] = value
    x = network.flat.double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, 6):
        g = x - 0.5
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        x = x - rate * 0.1 * x
        x = x - rate * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-6)
        steps(optimizer, network, 1)
    torch.testing.assert_close(network.flat.double(), x, atol=1e-5, rtol=1e-5)


def test_group_rates_and_names_reach_the_optimizer():
    optimizer, _ = build_optimizer(options("AdamW"), FlatNetwork(rates=(1e-3, 2e-3)).param_groups)
    assert [(g["lr"], g["name"]) for g in optimizer.param_groups] == [
        (1e-3, "group0"),
        (2e-3, "group1"),
    ]
    assert optimizer.param_groups[0]["fused"] is True


def test_sgd_nesterov_has_momentum_unless_told_otherwise():
    optimizer, _ = build_optimizer(options("sgdnesterov"), FlatNetwork().param_groups)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)
    optimizer, _ = build_optimizer(
        options("SGDNesterov", "momentum=0.5"), FlatNetwork().param_groups
    )
    assert optimizer.defaults["momentum"] == 0.5


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("AdmW8bit", (), "did you mean AdamW8bit"),
        ("prodgy", (), "did you mean Prodigy"),
        ("qqqqqqqq", (), "known: AdamW"),
        ("LBFGS", (), "several times"),
        ("torch.optim.SparseAdam", (), "sparse"),
        ("AdamW", ("no_such=1",), "no_such"),
        ("AdamW", ("betas=2.0,3.0",), "beta"),
        ("AdamW", ("lr=text",), "refused its arguments"),
        ("no_such_package.optim.Best", (), "pip install \"no_such_package\""),
        ("torch.optim.NoSuchClass", (), "has no class NoSuchClass"),
        ("test_optimizers.NoOptimizer", (), "no torch optimizer"),
    ],
)  # fmt: skip
def test_bad_names_and_arguments_are_explained(kind, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        build_optimizer(options(kind, *arguments), FlatNetwork().param_groups)
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UserError, match=r"anima-fast\[optimizers\]"):
        build_optimizer(
            options("Prodigy", learning_rate=1.0), FlatNetwork(rates=(1.0, 1.0)).param_groups
        )


def test_adaptive_optimizers_warn_about_small_rates_and_refuse_different_ones():
    pytest.importorskip("prodigyopt")
    _, notices = build_optimizer(options("Prodigy"), FlatNetwork(rates=(1e-4, 1e-4)).param_groups)
    assert any("about 1 is meant" in notice for notice in notices)
    _, notices = build_optimizer(options("Prodigy"), FlatNetwork(rates=(1.0, 1.0)).param_groups)
    assert notices == []
    with pytest.raises(UserError, match="different ones"):
        build_optimizer(options("Prodigy"), FlatNetwork(rates=(1.0, 0.5)).param_groups)


def test_rates_by_name_and_what_prodigy_makes_of_them():
    pytest.importorskip("prodigyopt")
    network = FlatNetwork(rates=(0.5, 0.5))
    optimizer, _ = build_optimizer(options("Prodigy", "d0=1e-3"), network.param_groups)
    steps(optimizer, network, 10)
    d = optimizer.param_groups[0]["d"]
    assert d > 1e-3
    effective = {"group0": 0.5 * d, "group1": 0.5 * d}
    assert learning_rates(optimizer) == ({"group0": 0.5, "group1": 0.5}, effective)
    plain, _ = build_optimizer(options("AdamW"), FlatNetwork().param_groups)
    assert learning_rates(plain)[1] == {}


def test_adafactor_relative_step_drops_the_rates():
    optimizer, notices = build_optimizer(options("AdaFactor"), FlatNetwork().param_groups)
    assert all(group["lr"] is None for group in optimizer.param_groups)
    assert any("relative_step" in notice for notice in notices)
    _, notices = build_optimizer(
        options("AdaFactor", "warmup_init=True", "relative_step=False"), FlatNetwork().param_groups
    )
    assert any("warmup_init" in notice for notice in notices)


def test_adafactor_with_a_given_rate_advises():
    arguments = ("relative_step=False", "scale_parameter=False")
    optimizer, notices = build_optimizer(
        options("AdaFactor", *arguments), FlatNetwork().param_groups
    )
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    assert any("constant_with_warmup" in notice for notice in notices)
    assert any("max_grad_norm" in notice for notice in notices)


def test_paged_optimizers_say_that_they_do_not_page_here():
    _, notices = build_optimizer(options("PagedAdamW8bit"), FlatNetwork().param_groups)
    assert any("CUDA only" in notice for notice in notices)


def test_averaged_weights_restores_the_training_point_bit_for_bit():
    pytest.importorskip("schedulefree")
    network = FlatNetwork()
    optimizer, notices = build_optimizer(
        options("AdamWScheduleFree"), network.param_groups, "cosine"
    )
    assert any("schedules itself" in notice for notice in notices)
    steps(optimizer, network, 7)
    before = network.flat.clone()
    with averaged_weights(optimizer):
        assert not torch.equal(network.flat, before)
        averaged = network.flat.clone()
    assert torch.equal(network.flat, before)
    optimizer.eval()
    torch.testing.assert_close(network.flat, averaged)
    train_mode(optimizer)
    torch.testing.assert_close(network.flat, before)


def test_averaged_weights_of_other_optimizers_are_the_weights():
    network = FlatNetwork()
    optimizer, _ = build_optimizer(options("AdamW"), network.param_groups)
    before = network.flat.clone()
    with averaged_weights(optimizer):
        assert torch.equal(network.flat, before)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_clip_equals_torch_over_the_matrices(limit):
    network = FlatNetwork()
    network.flat_grad.copy_(torch.randn(network.flat.shape))
    copies = [torch.nn.Parameter(torch.zeros(size)) for _, size, _ in network.pieces]
    for copy, (start, size, _) in zip(copies, network.pieces, strict=True):
        copy.grad = network.flat_grad[start : start + size].clone()
    expected = torch.nn.utils.clip_grad_norm_(copies, limit or float("inf"))
    norm = clip_flat_grad(network.flat_grad, limit)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(network.flat_grad, torch.cat([c.grad for c in copies]))
