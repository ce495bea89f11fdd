"""Predicted times and memory against numbers worked out by hand, and the cards they start from."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anima_fast.adapters.targets import find_targets
from anima_fast.bench.model import memory_gib, prediction
from anima_fast.bench.resources import LIMITS
from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.kernels.op import Cost, Op
from anima_fast.kernels.registry import OPS
from anima_fast.measure import step_time as dit_step
from anima_fast.measure.cards import CARDS, find_card, float16_sums
from anima_fast.measure.rates import Rates
from anima_fast.measure.step_time import (
    OpUse,
    lora_parameters,
    op_times,
    sized,
    step_flops,
    step_time,
)
from anima_fast.memory.lora import published_step
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.dit_config import PUBLISHED
from anima_fast.models.recompute import POLICIES

# 1 TB/s, 100 TFLOP/s, 4 us.
RATES = Rates(1e12, 1e14, 4e-6)


def fake_op(name, cost, labels=("",)):
    return Op(
        name=name,
        function=torch.relu,
        reference=torch.relu,
        make_inputs=lambda sizes, dtype, device: {},
        grads=(),
        shapes=(),
        real_shapes=lambda tokens: {
            label: {"B": 1, "L": tokens, "R": 16, "D": 100} for label in labels
        },
        cost=cost,
    )


# B·L·D elements read and written: 2 · 2 bytes each; backward twice as much.
COPY = fake_op(
    "copy",
    lambda s, size: Cost(2 * s["B"] * s["L"] * s["D"] * size, 4 * s["B"] * s["L"] * s["D"] * size),
)
# 1000 operations for every element and rank.
PRODUCT = fake_op(
    "product",
    lambda s, size: Cost(
        size, size, 1000.0 * s["B"] * s["L"] * s["D"] * s["R"], 500.0 * s["B"] * s["L"] * s["D"]
    ),
    labels=("a", "b"),
)
FAKES = {"copy": COPY, "product": PRODUCT}


def test_seconds():
    # 1 MB at 1 TB/s is 1 us; 1 GFLOP at 100 TFLOP/s is 10 us.
    assert RATES.seconds(1e6, 0) == pytest.approx(5e-6)
    assert RATES.seconds(1e6, 1e9) == pytest.approx(14e-6)
    assert RATES.seconds(2e7, 1e9) == pytest.approx(24e-6)
    assert RATES.seconds(0, 0) == 0
    assert RATES.bound(1e6, 0) == "launch"
    assert RATES.bound(2e7, 1e9) == "memory"
    assert RATES.bound(1e6, 1e9) == "compute"


def test_assumed_rates():
    rates = Rates.of(find_card("rtx-4090"))
    assert rates.bandwidth == pytest.approx(0.85 * 1008e9)
    assert rates.tensor == pytest.approx(0.75 * 165.15e12, rel=1e-3)
    assert rates.launch_s == 4e-6


def test_op_times():
    copy, a, b = op_times(RATES, tokens=1000, batch=2, rank=4, ops=FAKES)
    # 2 · 1000 · 100 elements, 4 bytes: 0.8 us forward, 1.6 backward.
    assert (copy.op, copy.label) == ("copy", "")
    assert copy.forward_s == pytest.approx(4.8e-6) and copy.backward_s == pytest.approx(5.6e-6)
    assert copy.bound == "launch"
    # 1000 · 200 000 · 4 operations: 8 us; backward 500 · 200 000: 1 us.
    assert (a.label, b.label, a.bound) == ("a", "b", "compute")
    assert a.forward_s == pytest.approx(12e-6) and a.backward_s == pytest.approx(5e-6)
    assert a.sizes == {"B": 2, "L": 1000, "R": 4, "D": 100}


def test_sizes_that_a_run_chooses():
    assert sized({"B": 2, "D": 3}, batch=4, rank=8) == {"B": 8, "D": 3}
    assert sized({"D": 3, "R": 16}, batch=4, rank=8) == {"D": 3, "R": 8}
    assert sized({"M": 5, "K": 2}, batch=4, rank=8) == {"M": 20, "K": 2}


def test_a_batch_moves_and_multiplies_as_often():
    """Every op over image tokens does four times as much for four images, weights aside."""
    one, four = (op_times(RATES, tokens=4096, batch=batch) for batch in (1, 4))
    for a, b in zip(one, four, strict=True):
        if a.op == "adamw":
            assert a.cost == b.cost
        elif a.op.startswith("lora_linear"):
            assert b.cost.forward_flops == 4 * a.cost.forward_flops
            assert a.cost.forward_bytes < b.cost.forward_bytes < 4 * a.cost.forward_bytes
        else:
            assert b.cost.forward_flops == 4 * a.cost.forward_flops, a.op
            assert b.cost.forward_bytes == 4 * a.cost.forward_bytes, a.op


def short_times(**run):
    """Forward and backward of a short variant as shares of its op's, by name and shape."""
    times = {(time.op, time.label): time for time in op_times(RATES, tokens=4096, **run)}
    return {
        (name, label): tuple(
            (getattr(times[f"{name}_short", label], part) - RATES.launch_s)
            / (getattr(times[name, label], part) - RATES.launch_s)
            for part in ("forward_s", "backward_s")
        )
        for name, label in times
        if f"{name}_short" in dit_step.SHORT_SHARES
    }


def test_short_sums_take_a_share_of_the_time():
    found = short_times(float16_sums=2.0)
    assert found["attention", "self"] == pytest.approx((1 / 1.3, 1 / 1.6))
    # 2 M K N of 2 M K N + 2 M R (K + N) operations, and one adapter product more of each backward.
    adapter = 32 * (2048 + 8192) / (2048 * 8192)
    expected = [(1 / 1.75 + n * adapter) / (1 + n * adapter) for n in (1, 2)]
    assert found["lora_linear", "up"] == pytest.approx(expected)
    # Bound by memory: as long as before.
    assert found["attention", "cross"][0] == found["lora_linear", "text kv"][0] == 1


@pytest.mark.parametrize("rate", [1.0, 1.1])
def test_short_sums_are_not_taken_where_they_are_no_faster(rate):
    assert all(share == (1, 1) for share in short_times(float16_sums=rate).values())


def test_mfu_counts_nothing_twice():
    """The share of the peak is of the operations by which the benchmark judges a measured step."""
    card = find_card("rtx-3060")
    found = prediction(card, Rates.of(card), tokens=1024, batch=2, rank=8)
    flops = step_flops(PUBLISHED, 1024, 2, 8, 96)
    for step in found["steps"]:
        assert step["mfu"] == pytest.approx(flops / step["seconds"] / (card.bf16_tflops * 1e12))
    # Attention runs 18 of 12 useful, and policy block the whole forward again.
    ran = sum(use.count * (t.cost.forward_flops + t.cost.backward_flops)
              for use in dit_step.BLOCK for t in op_times(RATES, tokens=1024, batch=2, rank=8)
              if (t.op, t.label) == (use.op, use.label))  # fmt: skip
    assert 0.8 * 28 * ran < flops < 28 * ran


@pytest.mark.parametrize(
    ("policy", "again"),
    # Forward calls that backward repeats per block, in us: copy 4.8, product a 12, b 12.
    [("none", 4.8), ("mlp", 4.8 + 12), ("block", 4.8 + 2 * 4.8 + 12)],
)
def test_step(policy, again):
    times = op_times(RATES, tokens=1000, batch=2, rank=4, ops=FAKES)
    found = step_time(
        times,
        policy,
        block=(
            OpUse("copy", "", 2, again=1),
            OpUse("product", "a", 1, mlp_again=1),
            OpUse("gone", ""),
        ),
        step=(OpUse("product", "b", 1),),
        blocks=10,
    )
    assert found.forward_s == pytest.approx(10 * (2 * 4.8e-6 + 12e-6))
    assert found.backward_s == pytest.approx(10 * (2 * 5.6e-6 + 5e-6))
    assert found.recompute_s == pytest.approx(10 * again * 1e-6)
    assert found.other_s == pytest.approx(17e-6)
    assert found.missing == ("gone",)
    assert found.seconds == pytest.approx(216e-6 + 162e-6 + 10 * again * 1e-6 + 17e-6)


def test_step_names_shapes_that_exist():
    known = {(time.op, time.label) for time in op_times(RATES, tokens=4096)}
    for use in (*dit_step.BLOCK, *dit_step.SHORT_BLOCK, *dit_step.STEP):
        assert use.op not in OPS or (use.op, use.label) in known, use
    changed = {use.op for use in dit_step.SHORT_BLOCK} - {use.op for use in dit_step.BLOCK}
    assert changed == dit_step.SHORT_SHARES.keys() <= OPS.keys()


def test_parameter_ops_have_the_size_of_the_run():
    cost = {"forward_bytes": 28.0 * lora_parameters(8), "backward_bytes": 0.0}
    op = fake_op("adamw", lambda s, size: Cost((3 * size + 16) * s["N"], 0), labels=("rank 16",))
    (time,) = op_times(RATES, tokens=4096, rank=8, ops={"adamw": op})
    assert time.label == "" and time.sizes["N"] == 28 * 8 * 51200
    assert time.cost == Cost(**cost)


def memory(policy, **run):
    return memory_gib(published_step(policy, **run))


def test_memory():
    # A unit is 4096 · 2048 · 2 bytes = 1/64 GiB.
    none, mlp, block = (memory(policy, tokens=4096) for policy in POLICIES)
    assert none["saved"] == pytest.approx(28 * 13.53 / 64)
    assert mlp["saved"] == pytest.approx(28 * 9.51 / 64)
    assert block["saved"] == pytest.approx(28 * 1.18 / 64)
    assert none["workspace"] == pytest.approx(14 / 64)
    assert mlp["workspace"] == pytest.approx(18.02 / 64)
    assert block["workspace"] == pytest.approx(26.35 / 64)
    assert none["weights"] == pytest.approx(3.644, abs=1e-3)
    # 51 200 parameters per rank and block, 16 bytes each.
    assert none["adapters"] == pytest.approx(28 * 32 * 51200 * 16 / 2**30)
    assert none["total"] == pytest.approx(11.27, abs=0.01)
    assert memory("none", tokens=1024, batch=8)["saved"] == pytest.approx(2 * none["saved"])
    larger = memory("none", tokens=4096, rank=64)
    assert larger["adapters"] == pytest.approx(2 * none["adapters"])


@pytest.mark.parametrize(("memory_gib", "fits"), [(12, True), (11.5, False)])
def test_a_card_holds_it_with_a_margin(memory_gib, fits):
    card = dataclasses.replace(find_card("rtx-3060"), memory_gib=memory_gib)
    steps = prediction(card, Rates.of(card), tokens=4096, batch=1, rank=32)["steps"]
    assert steps[0]["recompute"] == "none" and steps[0]["fits"] is fits


def test_sizes_are_those_of_the_model():
    with torch.device("meta"):
        dit = AnimaDiT(PUBLISHED)
    assert sum(p.numel() for p in dit.parameters()) == 1_956_405_248
    assert published_step("none", tokens=16)["weights"] == 2 * 1_956_405_248
    layers = [target.linear for target in find_targets(dit, None, None)]
    assert len(layers) == 280
    wanted = sum(layer.in_features + layer.out_features for layer in layers)
    assert lora_parameters(1) == wanted
    assert lora_parameters(32) == 32 * wanted
    assert published_step("none", tokens=16, rank=32)["parameters"] == 4 * 32 * wanted


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    # As the white papers print them.
    [("rtx-3090", 35.6, 71), ("rtx-4090", 82.6, 165.2), ("rtx-5090", 104.8, 209.5)],
)
def test_geforce_figures(name, fp32, bf16):
    card = CARDS[name]
    assert card.fp32_tflops == pytest.approx(fp32, abs=0.1)
    assert card.bf16_tflops == pytest.approx(bf16, abs=0.3)
    # 142, 330 and 419 with float16 sums.
    assert card.float16_sums == 2


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 2),
        ("NVIDIA TITAN RTX", 2),
        ("NVIDIA RTX A6000", 1),
        ("NVIDIA RTX 6000 Ada Generation", 1),
        ("NVIDIA A100-SXM4-80GB", 1),
    ],
)
def test_the_rate_of_float16_sums_follows_from_a_name(name, times):
    assert float16_sums(name) == times


def test_cards_are_plausible():
    for name, card in CARDS.items():
        assert name == card.name and card.arch in LIMITS
        # Wide enough for every family, narrow enough for a slipped digit or column.
        assert 0.5 < card.bf16_tflops / card.sms < 16, name
        assert 5 < card.bandwidth_gb_s / card.sms < 60, name
        assert 1.5 < card.bf16_tflops / card.fp32_tflops < 31, name
        assert 8 <= card.memory_gib <= 192 and 60 < card.power_w <= 1000, name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rtx-4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("GeForce RTX 3060 Ti", "rtx-3060-ti"),
        ("RTX_4060_Ti_16GB", "rtx-4060-ti-16gb"),
        ("h100", "h100-sxm"),
        # Sold with 8 and 16 GB, which no driver tells apart.
        ("rtx-4060-ti", "rtx-4060-ti-8gb"),
        ("NVIDIA GeForce RTX 5060 Ti", "rtx-5060-ti-8gb"),
        ("RTX 4070 Ti", "rtx-4070-ti"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ],
)
def test_find_card(name, found):
    assert find_card(name).name == found


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rtx-4091", "rtx-4090"),
        ("a100", "a100-40, a100-80"),
        ("?", "a100-80"),
        ("RTX 4070 Laptop GPU", "rtx-4070"),
        ("rtx-4070-s", "rtx-4070-super"),
    ],
)
def test_unknown_card(name, near):
    with pytest.raises(UserError, match=f"--card .* is unknown: use .*{near}"):
        find_card(name)


def invoke(*words):
    return CliRunner().invoke(app, ["bench", "model", *words])


def test_command():
    done = invoke("--card", "rtx-3060", "--tokens", "1024", "--batch", "2", "--rank", "8", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["card"] == "GeForce RTX 3060"
    assert found["run"] == {"tokens": 1024, "batch": 2, "rank": 8}
    assert {row["op"] for row in found["ops"]} == set(OPS)
    assert [step["recompute"] for step in found["steps"]] == list(POLICIES)
    for step in found["steps"]:
        parts = dict(step["memory_gib"])
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
        assert step["fits"] == (sum(parts.values()) <= 0.95 * 12)
    done = invoke("--card", "rtx-3060")
    assert done.exit_code == 0, done.output
    words = ("GeForce RTX 3060", "2 times with float16 sums", "fp16 short s", "assumed", "MFU")
    for word in (*OPS, *POLICIES, *words):
        assert word in done.output, word


@pytest.mark.parametrize(("card", "least", "most"), [("rtx-3060", 1.3, 1.75), ("h200", 1, 1)])
def test_bf16_and_short_sums_side_by_side(card, least, most):
    found = json.loads(invoke("--card", card, "--json").output)
    assert found["rates"]["float16_sums"] == (2 if most > 1 else 1)
    for step in found["steps"]:
        assert step["fp16_short_times"] == step["seconds"] / step["fp16_short_s"]
        assert least <= step["fp16_short_times"] <= most
    text = invoke("--card", card).output
    assert ("float16 sums no faster" in text) == (most == 1)
    step = found["steps"][0]
    (line,) = (line for line in text.splitlines() if line.startswith("none "))
    shown = [f"{step['seconds']:.3f}", f"{step['fp16_short_s']:.3f}"]
    assert [line.split()[i] for i in (1, 3)] == shown
    assert line.split()[4] == f"{step['fp16_short_times']:.2f}"


def test_the_predictions_of_the_docs_are_those_of_the_command():
    """The table of docs/performance.md, at 512x512 and 1024x1024."""
    page = (Path(__file__).parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    table = page.split("| bf16 → fp16 short, 512x512 |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) >= 6
    for name, *cells in rows:
        card = find_card(name)
        for cell, tokens in zip(cells, (1024, 4096), strict=True):
            step = prediction(card, Rates.of(card), tokens=tokens, batch=1, rank=32)["steps"][0]
            bf16, short = (f"{1e3 * step[key]:.0f}" for key in ("seconds", "fp16_short_s"))
            assert cell == f"{bf16} → {short} ms, {step['fp16_short_times']:.2f}", (name, tokens)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--card", "rtx-4091"], "rtx-4090"),
        (["--card", "4090", "--tokens", "0"], "--tokens 0: expected at least 1"),
        (["--card", "4090", "--rank", "-1"], "--rank -1: expected at least 1"),
    ],
)
def test_command_refuses(words, message):
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card to measure")
def test_without_a_card_one_must_be_named():
    done = invoke()
    assert done.exit_code == 2 and "--card" in done.stderr


@pytest.mark.gpu
def test_measured_card():
    from anima_fast.measure.rates import measured_card

    found = measured_card()
    card, rates = found.card, found.rates
    assert found.warmth.seconds > 0 and 0.5 * rates.tensor < found.cold.tensor < 3 * rates.tensor
    assert 0.3 * card.bandwidth_gb_s < rates.bandwidth / 1e9 < 1.1 * card.bandwidth_gb_s
    assert 0.3 * card.bf16_tflops < rates.tensor / 1e12 < 1.3 * card.bf16_tflops
    assert invoke("--json").exit_code == 0
