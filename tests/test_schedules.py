"""Learning-rate schedules against transformers' and diffusers' own, and their resuming."""

import json

import pytest
import torch

from anima_fast.errors import UserError
from anima_fast.options.run import TrainOptions
from anima_fast.training.optimizers import schedules
from anima_fast.training.optimizers.build import build_optimizer
from anima_fast.training.optimizers.schedules import restore_scheduler, step_count

TOTAL = 40


def build_scheduler(options, optimizer, total):
    return schedules.build_scheduler(options, optimizer, total, learning_rate=options.learning_rate)


def optimizer(rates=(1e-3, 4e-3)):
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups)


def rates_over(scheduler, count=TOTAL):
    seen = []
    for _ in range(count):
        seen.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return torch.tensor(seen, dtype=torch.float64)


def ours(count=TOTAL, rates=(1e-3, 4e-3), total=TOTAL, **options):
    return rates_over(build_scheduler(TrainOptions(**options), optimizer(rates), total), count)


TRANSFORMERS = {
    "constant": ({}, {}),
    "constant_with_warmup": ({"lr_warmup_steps": 8}, {"num_warmup_steps": 8}),
    "linear": ({"lr_warmup_steps": 8}, {"num_warmup_steps": 8}),
    "cosine": ({"lr_warmup_steps": 0.2}, {"num_warmup_steps": 8}),
    "cosine_with_restarts": (
        {"lr_warmup_steps": "20%", "lr_scheduler_num_cycles": 3},
        {"num_warmup_steps": 8, "scheduler_specific_kwargs": {"num_cycles": 3}},
    ),
    "inverse_sqrt": (
        {"lr_warmup_steps": 8, "lr_scheduler_timescale": 20},
        {"num_warmup_steps": 8, "scheduler_specific_kwargs": {"timescale": 20}},
    ),
    "cosine_with_min_lr": (
        {"lr_warmup_steps": 8, "lr_scheduler_min_lr_ratio": 0.1},
        {"num_warmup_steps": 8, "scheduler_specific_kwargs": {"min_lr_rate": 0.1}},
    ),
    "warmup_stable_decay": (
        {"lr_warmup_steps": 8, "lr_decay_steps": 0.25, "lr_scheduler_min_lr_ratio": 0.1},
        {
            "num_warmup_steps": 8,
            "scheduler_specific_kwargs": {
                "num_decay_steps": 10, "num_stable_steps": 22, "min_lr_ratio": 0.1,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_schedules_equal_those_of_transformers(name):
    from transformers import get_scheduler

    options, arguments = TRANSFORMERS[name]
    reference = get_scheduler(name, optimizer(), num_training_steps=TOTAL, **arguments)
    expected = rates_over(reference)
    torch.testing.assert_close(ours(lr_scheduler=name, **options), expected, rtol=1e-12, atol=1e-15)


def test_polynomial_equals_that_of_transformers_for_each_rate():
    from transformers.optimization import get_polynomial_decay_schedule_with_warmup as reference

    for rate in (1e-3, 4e-3):
        single = optimizer((rate,))
        single.defaults["lr"] = rate
        expected = rates_over(reference(single, 8, TOTAL, power=2.0))
        got = ours(
            rates=(rate,), lr_scheduler="polynomial", lr_warmup_steps=8, lr_scheduler_power=2.0
        )
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_piecewise_constant_equals_that_of_diffusers():
    from diffusers.optimization import get_piecewise_constant_schedule

    rules = "1:10,0.1:20,0.01"
    expected = rates_over(get_piecewise_constant_schedule(optimizer(), rules))
    got = ours(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules={rules}",))
    torch.testing.assert_close(got, expected)
    with pytest.raises(UserError, match="step_rules"):
        ours(lr_scheduler="piecewise_constant")


def test_rates_of_groups_keep_their_ratio():
    rates = ours(lr_scheduler="cosine", lr_warmup_steps=5)
    torch.testing.assert_close(rates[:, 1], 4 * rates[:, 0])
    assert rates[0, 0] == 0
    assert rates[5, 0] == 1e-3


def test_warmup_with_constant_names_the_right_schedule():
    with pytest.raises(UserError, match="constant_with_warmup"):
        ours(lr_scheduler="constant", lr_warmup_steps=10)


@pytest.mark.parametrize(
    ("value", "steps"), [(0, 0), (None, 0), (7, 7), (0.25, 10), ("5%", 2), ("12", 12), ("0.5", 20)]
)
def test_steps_are_counts_fractions_or_percentages(value, steps):
    assert step_count(value, TOTAL, "--lr_warmup_steps") == steps


@pytest.mark.parametrize("value", [-1, "x%", "many", "-5%", "nan", "inf"])
def test_other_steps_are_refused(value):
    with pytest.raises(UserError, match="--lr_warmup_steps"):
        step_count(value, TOTAL, "--lr_warmup_steps")


def test_too_long_parts_of_warmup_stable_decay_are_refused():
    with pytest.raises(UserError, match="shorten"):
        ours(lr_scheduler="warmup_stable_decay", lr_warmup_steps=30, lr_decay_steps=20)


def test_custom_classes_by_dotted_path():
    got = ours(
        lr_scheduler_type="torch.optim.lr_scheduler.StepLR",
        lr_scheduler_args=("step_size=10", "gamma=0.5"),
    )
    assert got[:, 0].tolist() == [1e-3 * 0.5 ** (step // 10) for step in range(TOTAL)]
    short = ours(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=10", "gamma=0.5"))
    assert torch.equal(got, short)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("no_such.Class", (), "no_such"),
        ("torch.optim.lr_scheduler.None_", (), "has no class"),
        ("StepLR", ("wrong=1",), "refused its arguments"),
        ("torch.optim.SGD", (), "no scheduler"),
        ("ReduceLROnPlateau", (), "no scheduler that counts steps"),
    ],
)
def test_bad_custom_classes_are_explained(kind, arguments, message):
    with pytest.raises(UserError, match=message):
        ours(lr_scheduler_type=kind, lr_scheduler_args=arguments)


class MatrixNetwork:
    """Two matrices in one group, as a shape-dependent optimizer gets them."""

    def __init__(self):
        self.params = [torch.nn.Parameter(torch.ones(4, 8)), torch.nn.Parameter(torch.ones(8, 4))]

    def param_groups(self, flat=True):
        return [{"params": self.params, "lr": 1e-3, "name": "unet"}]

    def step(self, optimizer):
        for param in self.params:
            param.grad = param.detach().clone()
        optimizer.step()


@pytest.mark.parametrize("warmup_init", [True, False])
def test_adafactor_reports_the_rate_it_computes(warmup_init):
    from transformers.optimization import AdafactorSchedule

    options = TrainOptions(
        optimizer_type="AdaFactor",
        optimizer_args=(f"warmup_init={warmup_init}",),
        lr_scheduler="cosine",
        learning_rate=5e-4,
    )
    network = MatrixNetwork()
    adafactor, _ = build_optimizer(options, network.param_groups)
    scheduler = build_scheduler(options, adafactor, TOTAL)
    assert scheduler.get_last_lr() == [5e-4]
    reference = AdafactorSchedule(adafactor, 5e-4)
    for _ in range(3):
        network.step(adafactor)
        scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx([float(r) for r in reference.get_lr()])


def test_adafactor_schedule_needs_adafactor():
    with pytest.raises(UserError, match="AdaFactor"):
        ours(lr_scheduler="adafactor")


def test_schedule_free_optimizers_keep_their_rate():
    pytest.importorskip("schedulefree")
    options = TrainOptions(
        optimizer_type="AdamWScheduleFree", lr_scheduler="cosine", lr_warmup_steps=10
    )
    free, _ = build_optimizer(options, MatrixNetwork().param_groups)
    scheduler = build_scheduler(options, free, TOTAL)
    scheduler.step()
    assert scheduler.get_last_lr() == [1e-3]


CASES = [
    {"lr_scheduler": name, **options} for name, (options, _) in TRANSFORMERS.items()
] + [
    {"lr_scheduler": "polynomial", "lr_scheduler_power": 1.5},
    {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=7",)},
    {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("T_max=40",)},
]  # fmt: skip


@pytest.mark.parametrize(
    "options", CASES, ids=lambda o: o.get("lr_scheduler_type") or o["lr_scheduler"]
)
def test_a_restored_schedule_continues_exactly(options):
    options = TrainOptions(**options)
    whole = build_scheduler(options, optimizer(), TOTAL)
    expected = rates_over(whole)
    first = build_scheduler(options, optimizer(), TOTAL)
    rates_over(first, 15)
    saved = json.loads(json.dumps(first.state_dict()))
    groups = first.optimizer.state_dict()
    second_optimizer = optimizer()
    second = build_scheduler(options, second_optimizer, TOTAL)
    second_optimizer.load_state_dict(groups)
    assert restore_scheduler(second, saved) == []
    assert torch.equal(rates_over(second, TOTAL - 15), expected[15:])


def test_a_changed_length_follows_the_new_curve_with_a_notice():
    options = TrainOptions(lr_scheduler="linear")
    first = build_scheduler(options, optimizer(), TOTAL)
    rates_over(first, 10)
    longer = build_scheduler(options, optimizer(), 2 * TOTAL)
    (notice,) = restore_scheduler(longer, first.state_dict())
    assert "80 steps instead of 40" in notice
    expected = ours(2 * TOTAL, total=2 * TOTAL, lr_scheduler="linear")
    assert torch.equal(rates_over(longer, 70), expected[10:])


def test_another_schedule_is_noticed_and_another_kind_is_refused():
    first = build_scheduler(TrainOptions(lr_scheduler="linear"), optimizer(), TOTAL)
    other = build_scheduler(TrainOptions(lr_scheduler="cosine"), optimizer(), TOTAL)
    assert "from linear to cosine" in restore_scheduler(other, first.state_dict())[0]
    custom = build_scheduler(
        TrainOptions(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=3",)),
        optimizer(),
        TOTAL,
    )
    with pytest.raises(UserError, match="another kind"):
        restore_scheduler(first, custom.state_dict())
    with pytest.raises(UserError, match="another kind"):
        restore_scheduler(custom, first.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 100}, "reaches 39% of the one"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": TOTAL}, "reaches 98%"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": TOTAL - 1}, None),
        ({"lr_scheduler": "cosine"}, None),
        ({"lr_scheduler": "piecewise_constant", "lr_warmup_steps": 2}, "has no warm-up"),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 2}, "StepLR has no warm-up"),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant_with_warmup",
             "lr_warmup_steps": 2},
            "itself: its own warm-up is --optimizer_args warmup_steps=N",
        ),
        (
            {"optimizer_type": "AdaFactor", "lr_scheduler": "linear", "lr_warmup_steps": 2},
            "relative_step finds its own",
        ),
        (
            {"optimizer_type": "AdaFactor", "optimizer_args": ("relative_step=False",),
             "lr_scheduler": "linear", "lr_warmup_steps": 2},
            None,
        ),
    ],
)  # fmt: skip
def test_a_warmup_that_does_nothing_is_told(options, words):
    if options.get("optimizer_type") == "AdamWScheduleFree":
        pytest.importorskip("schedulefree")
    notices = schedules.about_warmup(TrainOptions(**options), TOTAL)
    assert len(notices) == (words is not None)
    assert not words or words in notices[0]
