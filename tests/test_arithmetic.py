"""`--mixed_precision auto` and `--sums`: the table, the measurement, the guard, what is told."""

import json
import math
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from stack import make_world, records, same_tensors, train_options

from anima_fast.bench.emulated import Sums, product
from anima_fast.errors import UserError
from anima_fast.inspection.doctor import doctor_text, examine
from anima_fast.kernels import dispatch, sums
from anima_fast.kernels.gemm import gemm
from anima_fast.measure import arithmetic, tuning
from anima_fast.measure import sums as measured
from anima_fast.measure.arithmetic import Arithmetic, Machine, ShortSums, by_name, resolve
from anima_fast.measure.probe import Probe
from anima_fast.measure.sums import LIBRARY, OWN, SHORT, Measured
from anima_fast.measure.tuning import CardFacts, TuningFile
from anima_fast.measure.verdict import Verdict, keep_verdict, model_key, stored_verdict
from anima_fast.options.run import FinetuneOptions, TrainOptions
from anima_fast.options.sample import SampleOptions
from anima_fast.sampling import run as sampling
from anima_fast.training import arithmetic as settling
from anima_fast.training import guard, loop, previews
from anima_fast.training.guard import Gradients, compare

CPU = torch.device("cpu")
GEFORCE = CardFacts("NVIDIA GeForce RTX 4090", "8.9", "580.65.06", "2.13.0", "3.7.1", "abc")
A100 = replace(GEFORCE, name="NVIDIA A100-SXM4-40GB", capability="8.0")


def never():
    raise AssertionError("nothing may be measured here")


FAST = ShortSums(64, True, "faster", 1.7)
SLOW = ShortSums(64, False, "not faster", 1.0)
MACHINES = {
    "geforce": Machine(True, "", lambda: FAST),
    "coarse": Machine(True, "", lambda: replace(FAST, chain=32)),
    "inexact": Machine(True, "", lambda: ShortSums(0, False, "too coarse")),
    "data centre": Machine(True, "", lambda: SLOW),
    "no kernels": Machine(True, "the package triton is missing", never),
    "turing": Machine(False, "", lambda: FAST),
    "old": Machine(False, "", lambda: SLOW),
    "old, no kernels": Machine(False, "the package triton is missing", never),
}
# machine: by --mixed_precision and --sums; "!" is an error.
TABLE = {
    "geforce": {
        ("auto", "auto"): "fp16 64", ("auto", "short"): "fp16 64", ("auto", "full"): "bf16 0",
        ("fp16", "auto"): "fp16 64", ("fp16", "short"): "fp16 64", ("fp16", "full"): "fp16 0",
    },
    "coarse": {
        ("auto", "auto"): "fp16 32", ("fp16", "auto"): "fp16 32", ("fp16", "short"): "fp16 32",
    },
    "inexact": {
        ("auto", "auto"): "bf16 0", ("auto", "short"): "bf16 0", ("auto", "full"): "bf16 0",
        ("fp16", "auto"): "fp16 0", ("fp16", "short"): "!", ("fp16", "full"): "fp16 0",
    },
    "data centre": {
        ("auto", "auto"): "bf16 0", ("auto", "short"): "fp16 64", ("auto", "full"): "bf16 0",
        ("fp16", "auto"): "fp16 0", ("fp16", "short"): "fp16 64", ("fp16", "full"): "fp16 0",
    },
    "no kernels": {
        ("auto", "auto"): "bf16 0", ("auto", "short"): "bf16 0", ("auto", "full"): "bf16 0",
        ("fp16", "auto"): "fp16 0", ("fp16", "short"): "!", ("fp16", "full"): "fp16 0",
    },
    "turing": {
        ("auto", "auto"): "fp16 64", ("auto", "short"): "fp16 64", ("auto", "full"): "fp16 0",
        ("fp16", "auto"): "fp16 64",
    },
    "old": {
        ("auto", "auto"): "fp16 0", ("auto", "short"): "fp16 64", ("fp16", "auto"): "fp16 0",
    },
    "old, no kernels": {
        ("auto", "auto"): "fp16 0", ("auto", "short"): "fp16 0", ("fp16", "short"): "!",
    },
}  # fmt: skip
ROWS = [(name, *asked, found) for name, row in TABLE.items() for asked, found in row.items()]


@pytest.mark.parametrize("name, precision, sums_option, expected", ROWS)
def test_the_table(name, precision, sums_option, expected):
    if expected == "!":
        with pytest.raises(UserError, match="use --sums full"):
            resolve(precision, sums_option, MACHINES[name])
        return
    found = resolve(precision, sums_option, MACHINES[name])
    assert f"{found.precision} {found.chain}" == expected
    assert found.reason and found.chosen == (precision == "auto")
    assert found.sums == ("short" if found.chain else "full")
    # What auto encodes with stays bf16 where there is such a thing; by hand it is what is said.
    bf16 = precision == "auto" and MACHINES[name].has_bf16
    assert found.encoders == ("bf16" if bf16 else "fp16")


@pytest.mark.parametrize("precision", ["bf16", "no", "fp32"])
def test_what_is_not_float16_has_no_short_sums(precision):
    machine = Machine(True, "", never)
    for asked in ("auto", "full"):
        found = resolve(precision, asked, machine)
        assert (found.precision, found.chain, found.encoders) == (precision, 0, precision)
    with pytest.raises(UserError, match="--sums short is about float16"):
        resolve(precision, "short", machine)


@pytest.mark.parametrize(
    "given",
    [
        {"mixed_precision": "bf16", "sums": "short"},
        {"mixed_precision": "no", "sums": "short"},
        {"full_bf16": True, "sums": "short"},
    ],
)
def test_short_sums_of_another_type_are_refused_with_the_options(given):
    with pytest.raises(UserError, match="use fp16 or auto"):
        TrainOptions(**given)
    with pytest.raises(UserError, match="use fp16 or auto"):
        SampleOptions(dtype="bf16", sums="short")
    assert TrainOptions(full_fp16=True, sums="short").mixed_precision == "fp16"


def test_defaults():
    assert TrainOptions().mixed_precision == SampleOptions().dtype == "auto"
    assert FinetuneOptions().mixed_precision == "bf16"
    assert FinetuneOptions(mixed_precision="auto").mixed_precision == "bf16"


@pytest.mark.parametrize(
    "name, capability, faster",
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), True),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", (8, 6), True),
        ("NVIDIA TITAN RTX", (7, 5), False),
        ("NVIDIA GeForce RTX 2080", (7, 5), False),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), False),
        ("NVIDIA A100-SXM4-40GB", (8, 0), False),
        ("NVIDIA RTX A6000", (8, 6), False),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9), False),
        ("NVIDIA L40S", (8, 9), False),
        ("NVIDIA H200", (9, 0), False),
        ("Quadro RTX 6000", (7, 5), False),
    ],
)
def test_by_name_before_anything_is_measured(name, capability, faster):
    found = by_name(name, capability)
    assert found.faster == faster and found.ratio is None and "by its name" in found.text


@pytest.mark.parametrize(
    "kernels, compiled, expected",
    [("auto", False, "no card"), ("eager", False, "no card"), ("triton", False, "")],
)
def test_a_cpu_measures_nothing(kernels, compiled, expected):
    machine = arithmetic.machine(CPU, kernels, compiled=compiled, short=never)
    assert machine.obstacle.startswith(expected) and bool(machine.obstacle) == bool(expected)
    assert resolve("auto", "auto", machine).precision == "bf16"
    # Interpreted kernels do as they are told.
    if not expected:
        assert resolve("fp16", "short", machine).chain == 64
        assert resolve("fp16", "auto", machine).chain == 0


# The measurement


def emulated(every, to_zero):
    return lambda a, b, chain: product(a.float(), b.float(), Sums(chain, every, to_zero))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(measured, "SIDE", 64)


def planted(times, seen=None):
    """A timer that has these times, and shows what it was to time."""

    def seconds(calls):
        if seen is not None:
            seen.update({name: call() for name, call in calls.items()})
        return {name: times[name] for name in calls if name in times}

    return seconds


# float16 sums as they may be rounded: (every, to zero) → the chain that a GeForce trains with.
@pytest.mark.parametrize(
    "every, to_zero, chain", [(16, False, 64), (8, False, 64), (16, True, 32), (8, True, 0)]
)
def test_the_rounding_decides_on_a_card_that_is_faster(small, every, to_zero, chain):
    times = planted({SHORT: 1.0, OWN: 1.8, LIBRARY: 1.7})
    found = measured.measure_sums(CPU, seconds=times, product=emulated(every, to_zero))
    assert found.chain == chain
    run = resolve("auto", "auto", Machine(True, "", found.judged))
    assert (run.precision, run.chain) == (("fp16", chain) if chain else ("bf16", 0))
    assert ("too coarsely" in run.reason) == (chain == 0)
    # What is kept says the same.
    kept = Measured.of(json.loads(json.dumps(vars(found))))
    assert kept.judged() == found.judged()


@pytest.mark.parametrize(
    "times, ratio, faster",
    [
        ({SHORT: 1.0, OWN: 1.8, LIBRARY: 1.7}, 1.7, True),
        ({SHORT: 1.0, OWN: 1.7, LIBRARY: 1.8}, 1.7, True),
        ({SHORT: 1.0, LIBRARY: 1.11}, 1.11, True),
        # Our own product in float32 sums is beaten, the library's is not.
        ({SHORT: 1.0, OWN: 1.8, LIBRARY: 1.09}, 1.09, False),
        ({SHORT: 1.0, OWN: 0.9, LIBRARY: 0.7}, 0.7, False),
        ({OWN: 1.0, LIBRARY: 1.0}, None, False),
        ({SHORT: 1.0}, None, False),
    ],
)
def test_short_sums_must_beat_the_faster_rival_by_a_tenth(times, ratio, faster):
    found = Measured(64, times, {}).judged()
    assert found.faster == faster and found.ratio == (ratio and pytest.approx(ratio))
    assert SHORT in times or found.chain == 0


def test_what_is_timed_is_what_trains(small):
    """A tile with float32 sums under the name of short ones would win nothing, or lie."""
    seen = {}
    with dispatch.use("triton"):
        times = planted({SHORT: 1.0, OWN: 1.5, LIBRARY: 1.5}, seen)
        assert measured.measure_sums(CPU, seconds=times, product=emulated(16, False)).chain == 64
        x, w = torch.randn(
            2, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float16
        )
        assert torch.equal(seen[SHORT], gemm(x, w, chain=64))
        assert not torch.equal(seen[SHORT], gemm(x, w))
        assert seen[OWN].dtype == seen[LIBRARY].dtype == torch.bfloat16
        assert torch.equal(seen[OWN], gemm(x.bfloat16(), w.bfloat16()))
    torch.testing.assert_close(seen[LIBRARY], seen[OWN], atol=0.1, rtol=0.02)


def test_the_kernel_is_probed_as_it_trains(monkeypatch):
    seen = []
    monkeypatch.setattr(measured, "probe", lambda product, *given: seen.append((product, *given)))
    monkeypatch.setattr(measured, "choose_chain", lambda probe: (probe(32), Probe(0, 1, 0, 1)))
    measured.measure_sums(CPU)
    ((own, chain, device),) = seen
    assert (chain, device) == (32, CPU)
    a, b = torch.randn(20, 70).half(), torch.randn(70, 9).half()
    with dispatch.use("triton"):
        expected = gemm(a, b.T, dtype=torch.float32, chain=32)
        assert expected.dtype == torch.float32 and torch.equal(own(a, b, chain), expected)


def test_the_timer_takes_the_best_time_and_leaves_out_what_fails():
    found = measured.best_seconds({"good": lambda: None, "bad": never})
    assert found.keys() == {"good"} and 0 < found["good"] < 1


def test_a_card_that_cannot_compile_or_has_no_memory(monkeypatch):
    def fails(a, b, chain):
        raise RuntimeError("PTX of a later day")

    found = measured.measure_sums(CPU, product=fails)
    assert found.is_complete and not found.judged().faster
    assert "PTX of a later day" in found.judged().text

    def full(a, b, chain):
        raise torch.OutOfMemoryError

    assert not measured.measure_sums(CPU, product=full).is_complete
    # Or the rivals alone had room.
    rivals = measured.Measured(64, {measured.OWN: 1.0, measured.LIBRARY: 1.0}, {})
    assert not rivals.is_complete and not rivals.judged().faster
    # Then the name decides, and nothing is kept.
    for card, faster in ((GEFORCE, True), (A100, False)):
        said = []
        short = measured.measured_sums(
            card, CPU, said.append, measure=lambda d: Measured(64, {}, {})
        )
        assert short.faster == faster and "by its name" in short.text
        assert not TuningFile(card).path.exists()


# The tuning file

RATIO_2 = Measured(64, {SHORT: 1.0, OWN: 2.0, LIBRARY: 2.0}, {"error": 4e-4}, "")


def test_a_card_is_measured_once():
    said, calls = [], []

    def measure(device):
        calls.append(device)
        return RATIO_2

    for _ in range(2):
        short = measured.measured_sums(GEFORCE, CPU, said.append, measure=measure)
        assert short == RATIO_2.judged() == measured.known_sums(GEFORCE)
    assert len(calls) == 1 and said == ["measuring float16 sums, once for this card"]
    # One file a card, which people can read, with room for what is measured later.
    path = TuningFile(GEFORCE).path
    assert path.name == "nvidia-geforce-rtx-4090.json"
    whole = json.loads(path.read_text())
    assert whole.keys() == {"card", "sums"} and whole["card"]["driver"] == "580.65.06"
    assert TuningFile(GEFORCE).add("guard", {"a": 1}) is None
    assert TuningFile(GEFORCE).add("guard", {"b": 2}) is None
    assert TuningFile(GEFORCE).section("guard") == {"a": 1, "b": 2}
    assert measured.known_sums(GEFORCE) == short


@pytest.mark.parametrize("fact", ["name", "capability", "driver", "torch", "triton", "kernels"])
def test_other_facts_are_another_card(fact):
    TuningFile(GEFORCE).add("sums", vars(RATIO_2))
    other = replace(GEFORCE, **{fact: "8.6" if fact == "capability" else "other"})
    assert TuningFile(other).section("sums") == {}
    TuningFile(other).add("guard", {"a": 1})
    assert TuningFile(other).section("sums") == {} and TuningFile(other).section("guard")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: "",
        lambda whole: "[1, 2]",
        lambda whole: json.dumps(whole)[:-9],
        lambda whole: json.dumps(whole | {"sums": 3}),
        lambda whole: json.dumps(whole | {"sums": {"chain": 64}}),
        lambda whole: json.dumps(whole | {"sums": whole["sums"] | {"chain": 128}}),
        lambda whole: json.dumps(whole | {"sums": whole["sums"] | {"chain": math.inf}}),
        lambda whole: json.dumps(whole | {"sums": whole["sums"] | {"seconds": {SHORT: "x"}}}),
        lambda whole: json.dumps(whole | {"sums": whole["sums"] | {"seconds": {SHORT: 0, OWN: 1}}}),
    ],
)
def test_a_damaged_file_is_none(damage):
    file = TuningFile(GEFORCE)
    file.add("sums", vars(RATIO_2))
    file.path.write_text(damage(json.loads(file.path.read_text())))
    assert measured.known_sums(GEFORCE).text.endswith("by its name")
    again = measured.measured_sums(GEFORCE, CPU, lambda text: None, measure=lambda d: RATIO_2)
    assert again.ratio == 2.0 and measured.known_sums(GEFORCE) == again


def test_a_home_that_cannot_be_written_is_said_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANIMA_FAST_HOME", str(tmp_path / "file" / "home"))
    said = []
    short = measured.measured_sums(GEFORCE, CPU, said.append, measure=lambda d: RATIO_2)
    assert short.ratio == 2.0
    assert any("at each start" in line and "\n" not in line for line in said)


def test_facts_of_this_machine(tmp_path, monkeypatch):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(tuning, "DRIVER_FILE", tmp_path / "version")
    tuning.driver_version.cache_clear()
    tuning.kernel_version.cache_clear()
    try:
        facts = CardFacts.of("A card", (8, 6), "2.13.0")
        assert (facts.driver, facts.capability) == ("580.65.06", "8.6")
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "one.py").write_text("x = 1")
        monkeypatch.setattr(tuning, "KERNELS", tmp_path / "kernels")
        tuning.kernel_version.cache_clear()
        changed = CardFacts.of("A card", (8, 6), "2.13.0")
        assert changed != facts and replace(changed, kernels=facts.kernels) == facts
    finally:
        tuning.driver_version.cache_clear()
        tuning.kernel_version.cache_clear()


@pytest.mark.gpu
def test_this_card():
    found = measured.measure_sums(torch.device("cuda"))
    assert not found.failed and found.chain in (0, 32, 64)
    assert found.seconds.keys() == {SHORT, OWN, LIBRARY} or not found.chain
    card = measured.card_facts(0)
    assert by_name(card.name, torch.cuda.get_device_capability(0)).faster == found.judged().faster


def test_triton_is_not_imported_for_float32_sums(monkeypatch):
    monkeypatch.delitem(sys.modules, "anima_fast.kernels.sums")
    monkeypatch.setitem(sys.modules, "triton", None)
    with arithmetic.sums_of_run():
        arithmetic.set_sums(0)
    assert "anima_fast.kernels.sums" not in sys.modules


# Runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def geforce(monkeypatch):
    """The CPU is a GeForce where it is asked; its blocks run in plain PyTorch."""
    monkeypatch.setattr(settling, "machine_of", lambda *_: MACHINES["geforce"])
    for module in (settling, guard, sampling):
        monkeypatch.setattr(module, "card_facts", lambda device: GEFORCE)


def spied(monkeypatch):
    """The sums at each step, by what made it."""
    seen = []
    for name, module in (("loop", loop), ("guard", guard)):
        real = module.forward_backward

        def step(run, *args, real=real, name=name, **more):
            seen.append((name, run.options.mixed_precision, sums._chain))
            return real(run, *args, **more)

        monkeypatch.setattr(module, "forward_backward", step)
    return seen


def console(folder):
    return (folder / "console.log").read_text(encoding="utf-8")


def trained(world, folder, **changes):
    values = {"mixed_precision": "auto", "network_dropout": 0.2, "max_train_epochs": None}
    values |= {"max_train_steps": 4, **changes}
    return loop.train(train_options(world, folder, **values))


# What is told


@pytest.mark.parametrize(
    "given, card, told",
    [
        ({"mixed_precision": "bf16"}, GEFORCE, "fp16 with short sums is faster and closer"),
        (
            {"mixed_precision": "bf16", "measured": True},
            GEFORCE,
            "is 2.0 times as fast in products",
        ),
        ({"mixed_precision": "bf16"}, A100, ""),
        ({"mixed_precision": "bf16", "measured": True}, A100, "is 2.0 times as fast in"),
        ({"mixed_precision": "bf16", "sums": "full"}, GEFORCE, ""),
        ({"mixed_precision": "bf16", "obstacle": "eager"}, GEFORCE, ""),
        ({"mixed_precision": "bf16", "refused": True}, GEFORCE, ""),
        ({"mixed_precision": "no"}, GEFORCE, ""),
        ({"full_bf16": True}, GEFORCE, ""),
    ],
)
def test_bf16_by_hand_where_fp16_is_faster(tmp_path, monkeypatch, given, card, told):
    given, model = dict(given), tmp_path / "dit.safetensors"
    model.write_bytes(b"x")
    if given.pop("measured", False):
        TuningFile(card).add("sums", vars(RATIO_2))
    if given.pop("refused", False):
        keep_verdict(card, model, Verdict(64, 0.5, "far"))
    machine = replace(MACHINES["geforce"], obstacle=given.pop("obstacle", ""), short=never)
    monkeypatch.setattr(settling, "machine_of", lambda *_: machine)
    monkeypatch.setattr(settling, "card_facts", lambda device: card)
    options, said = TrainOptions(pretrained_model_name_or_path=str(model), **given), []
    settled, found = settling.settle(options, torch.device("cuda"), say=said.append)
    assert settled.mixed_precision == options.mixed_precision and found.chain == 0
    if not told:
        assert said == []
        return
    (line,) = said
    assert told in line and line.endswith("--mixed_precision fp16")


def test_what_cannot_run_here_is_predicted_for_elsewhere():
    options = TrainOptions(mixed_precision="fp16", sums="short", kernels="eager")
    assert settling.predicted(options, CPU).mixed_precision == "fp16"
    with pytest.raises(UserError, match="--sums short needs the project's kernels"):
        settling.settle(options, CPU, say=never)


@pytest.mark.parametrize(
    "network, title",
    [
        ({}, ""),
        ({"network_module": "networks.loha"}, "LoHa"),
        ({"network_module": "networks.lokr"}, "LoKr"),
        ({"network_args": ("dora_wd=True",)}, "DoRA"),
    ],
)
def test_blocks_that_run_plain_have_no_short_sums(monkeypatch, network, title):
    monkeypatch.setattr(
        settling, "machine", lambda *_, **__: Machine(True, "", lambda: ShortSums(64, True, ""))
    )
    options = TrainOptions(**network)
    found = settling.settle(options, CPU, say=lambda _: None)[1]
    assert (found.precision, found.chain) == (("bf16", 0) if title else ("fp16", 64))
    assert title in found.reason
    if title:
        with pytest.raises(UserError, match=f"{title} adapters run in plain PyTorch"):
            settling.settle(replace(options, mixed_precision="fp16", sums="short"), CPU, say=never)


def test_predictions_measure_nothing(monkeypatch):
    monkeypatch.setattr(settling, "card_facts", lambda device: GEFORCE)
    monkeypatch.setattr(settling, "measured_sums", never)
    monkeypatch.setattr(settling, "machine", lambda *_, short, **__: Machine(True, "", short))
    options = settling.predicted(TrainOptions(), torch.device("cuda"))
    assert (options.mixed_precision, options.sums) == ("fp16", "short")
    monkeypatch.setattr(settling, "card_facts", lambda device: A100)
    assert settling.predicted(TrainOptions(), torch.device("cuda")).mixed_precision == "bf16"


@pytest.mark.parametrize(
    "name, capability, kept, expected",
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), False, "fp16, float16 sums of 64 terms (float16 sums"),
        ("NVIDIA GeForce RTX 4090", (8, 9), True, "products in short sums are 2.00 times as fast"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), False, "bf16 (float16 sums are not faster"),
        ("Quadro RTX 6000", (7, 5), False, "sums in float32: Triton uses no tensor cores before"),
    ],
)
def test_doctor_says_what_auto_takes(monkeypatch, name, capability, kept, expected):
    major, minor = capability
    properties = SimpleNamespace(name=name, major=major, minor=minor)
    for function, value in {
        "is_available": True, "device_count": 1, "get_device_properties": properties,
        "get_device_capability": capability, "mem_get_info": (2**30, 2**31),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    monkeypatch.setattr(measured, "measure_sums", never)
    if kept:
        TuningFile(measured.card_facts(0)).add("sums", vars(RATIO_2))
    report = examine()
    (card,) = report["cards"]
    assert card["auto"]["precision"] == ("bf16" if "A100" in name else "fp16")
    (line,) = [t for t in doctor_text(report).splitlines() if "--mixed_precision auto:" in t]
    assert expected in line


# A state


SHORT_STATE = {"precision": "fp16", "chain": 64, "encoders": "bf16"}
BF16_STATE = settling.FORMER


@pytest.mark.parametrize(
    "saved, given, name, expected, told",
    [
        (SHORT_STATE, {}, "geforce", "fp16 64", ""),
        (SHORT_STATE, {}, "data centre", "fp16 64", ""),
        (SHORT_STATE, {}, "coarse", "fp16 32", ""),
        (SHORT_STATE, {}, "no kernels", "fp16 0", "with float32 sums: --sums short needs"),
        (SHORT_STATE, {"sums": "full"}, "geforce", "fp16 0", ""),
        (SHORT_STATE, {}, "turing", "fp16 64", "made with bf16"),
        (BF16_STATE, {}, "geforce", "bf16 0", ""),
        (BF16_STATE, {}, "turing", "fp16 64", "made with bf16"),
        (BF16_STATE, {"sums": "short"}, "geforce", "bf16 0", "with float32 sums: --sums short is"),
        (BF16_STATE, {"mixed_precision": "fp16"}, "geforce", "fp16 64", "precision: fp16"),
        ({"precision": "no", "chain": 0, "encoders": "no"}, {}, "geforce", "no 0", ""),
    ],
)
def test_auto_stays_with_its_state(monkeypatch, saved, given, name, expected, told):
    monkeypatch.setattr(settling, "machine_of", lambda *_: MACHINES[name])
    said = []
    options, found = settling.settle(TrainOptions(**given), CPU, say=said.append, saved=saved)
    assert f"{found.precision} {found.chain}" == expected
    assert (options.mixed_precision, options.sums) == (found.precision, found.sums)
    assert len(said) == bool(told) and told in "".join(said)
    # The state was judged when it was made.
    assert not found.chosen or not MACHINES[name].has_bf16


def test_a_resumed_run_keeps_its_arithmetic_or_says_so(world, tmp_path, geforce, monkeypatch):
    keep_verdict(GEFORCE, world["pretrained_model_name_or_path"], Verdict(64, 1.0))
    trained(world, tmp_path, max_train_steps=1, save_state_on_train_end=True)
    state = tmp_path / "lora-state"
    record = json.loads((state / "state.json").read_text())
    assert record["arithmetic"] == SHORT_STATE
    # The card is not faster any more, and nothing is judged again.
    monkeypatch.setattr(settling, "machine_of", lambda *_: MACHINES["data centre"])
    monkeypatch.setattr(guard, "first_gradients", never)
    again = {"max_train_steps": 2, "resume": str(state)}
    trained(world, tmp_path / "kept", **again)
    assert "precision" not in console(tmp_path / "kept")
    (start,) = records(tmp_path / "kept", "start")
    assert (start["step"], start["precision"], start["sums"]) == (1, "fp16", "short")
    trained(world, tmp_path / "bf16", mixed_precision="bf16", **again)
    line = "the precision changes from fp16, float16 sums of 64 terms to bf16; the run goes on"
    assert line in console(tmp_path / "bf16")


# `sample`


@pytest.mark.parametrize(
    "given, problem, expected",
    [
        ({}, "", "fp16 64 bf16"),
        ({}, "far from bf16", "bf16 0 bf16"),
        ({"sums": "full"}, "", "bf16 0 bf16"),
        ({"dtype": "fp16"}, "far from bf16", "fp16 64 fp16"),
        ({"dtype": "fp32"}, "", "fp32 0 fp32"),
    ],
)
def test_sample_computes_as_training_does(tmp_path, monkeypatch, given, problem, expected):
    model = tmp_path / "dit.safetensors"
    model.write_bytes(b"x")
    monkeypatch.setattr(sampling, "card_facts", lambda device: GEFORCE)
    monkeypatch.setattr(sampling, "machine", lambda *_, **__: MACHINES["geforce"])
    keep_verdict(GEFORCE, model, Verdict(64, 0.5, problem))
    options, said = SampleOptions(**given), []
    device = torch.device("cuda")
    found = sampling._arithmetic(options, str(model), device, said.append)
    assert f"{found.precision} {found.chain} {found.encoders}" == expected
    assert len(said) == (found.chain > 0)


def test_a_picture_of_float16_sums(world, tmp_path, monkeypatch):
    real, seen = sampling.sample_jobs, []

    def spy(dit, jobs, texts, **more):
        seen.append((dit.dtype, texts[0].dtype, sums._chain))
        return real(dit, jobs, texts, **more)

    found = Arithmetic("fp16", 64, "", "bf16", True)
    monkeypatch.setattr(sampling, "_arithmetic", lambda *_: found)
    monkeypatch.setattr(sampling, "sample_jobs", spy)
    names = {"dit": "pretrained_model_name_or_path"}
    files = {n: world[names.get(n, n)] for n in ("dit", "qwen3", "vae", "t5_tokenizer_path")}
    options = SampleOptions(
        **files, prompt="x", width=32, height=32, steps=1, device="cpu",
        output=str(tmp_path / "x.png"),
    )  # fmt: skip
    assert sampling.run_sample(options, quiet=True).exists()
    assert seen == [(torch.float16, torch.float16, 64)] and sums._chain == 0


# The guard


def gradients(*values, **saturated):
    return Gradients(torch.tensor(values, dtype=torch.float32), saturated)


@pytest.mark.parametrize(
    "narrow, wide, accepted, text",
    [
        (gradients(1, 2), gradients(1, 2.1), True, ""),
        # The loss scale is in one of them only.
        (gradients(1000, 2000), gradients(1, 2.1), True, ""),
        (gradients(1, 2, block0=0), gradients(1, 2), True, ""),
        (gradients(1, 2), gradients(1, 3), False, "differ from bf16's (cosine 0.990)"),
        (gradients(1, 2), gradients(-1, -2), False, "cosine -1.000"),
        (gradients(1, math.inf), gradients(1, 2), False, "not finite"),
        (gradients(1, math.nan), gradients(1, 2), False, "not finite"),
        (gradients(1, 2, block3=2, block9=5), gradients(1, 2), False, "7 numbers"),
        (gradients(1, 2), gradients(1, math.nan), True, ""),
        (gradients(0, 0), gradients(0, 0), None, ""),
        (gradients(math.nan, 0), gradients(math.nan, 0), None, ""),
    ],
)
def test_the_verdict(narrow, wide, accepted, text):
    verdict = compare(narrow, wide, 64)
    if accepted is None:
        assert verdict is None
        return
    assert (not verdict.problem) == accepted and text in verdict.problem
    assert "most in block9" in verdict.problem or "numbers" not in verdict.problem


def test_verdicts_belong_to_a_file_and_a_chain(tmp_path):
    model = tmp_path / "dit.safetensors"
    model.write_bytes(b"x" * 10)
    assert keep_verdict(GEFORCE, model, Verdict(64, 0.5, "far")) is None
    assert stored_verdict(GEFORCE, model, 64) == Verdict(64, 0.5, "far")
    assert stored_verdict(GEFORCE, model, 32) is None
    assert stored_verdict(GEFORCE, tmp_path / "none", 64) is None
    TuningFile(GEFORCE).add("guard", {model_key(model): {"chain": 64}})
    assert stored_verdict(GEFORCE, model, 64) is None
    model.write_bytes(b"y" * 11)
    assert stored_verdict(GEFORCE, model, 64) is None


def test_a_guarded_run_is_the_run_without_a_guard(world, tmp_path, geforce, monkeypatch):
    seen = spied(monkeypatch)
    made = []
    monkeypatch.setattr(previews, "sample_jobs", lambda *_, **__: made.append(sums._chain))
    first = trained(world, tmp_path / "first", sample_prompt="x --w 64 --h 64 --s 1 --d 3")
    assert made and set(made) == {64}
    assert seen[:2] == [("guard", "bf16", 0), ("guard", "fp16", 64)]
    steps = records(tmp_path / "first")
    assert seen[2:] == [("loop", "fp16", 64)] * len(steps) and sums._chain == 0
    verdict = TuningFile(GEFORCE).section("guard")[
        model_key(world["pretrained_model_name_or_path"])
    ]
    assert verdict["cosine"] > 0.99 and verdict["problem"] == ""
    # Once: the verdict is there. And by hand, with the encoders of bf16.
    seen.clear()
    second = trained(world, tmp_path / "second")
    assert {name for name, *_ in seen} == {"loop"}
    by_hand = settling.resolve
    monkeypatch.setattr(
        settling, "resolve", lambda *given: replace(by_hand(*given), encoders="bf16")
    )
    third = trained(world, tmp_path / "third", mixed_precision="fp16")
    assert {name for name, *_ in seen} == {"loop"}
    assert same_tensors(first.output, second.output) and same_tensors(first.output, third.output)
    losses = [[step["loss"] for step in records(tmp_path / n)] for n in ("first", "third")]
    assert losses[0] == losses[1]
    # What is told and recorded.
    assert "precision: fp16, float16 sums of 64 terms (faster)" in console(tmp_path / "first")
    assert "fp16 suits this model: gradients' cosine 0.99" in console(tmp_path / "first")
    with safe_open(first.output, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_mixed_precision"], metadata["ss_sums"]) == ("fp16", "short")
    run = json.loads((tmp_path / "first" / "run.json").read_text())
    assert (run["precision"], run["sums"]) == ("fp16", "short")
    (start,) = records(tmp_path / "first", "start")
    assert start == {"kind": "start", "step": 0, "precision": "fp16", "sums": "short"}
    assert "fp16, float16 sums of 64 terms" in (tmp_path / "first" / "report.html").read_text()


@pytest.mark.parametrize(
    "changes",
    [{"network_args": ("train_llm_adapter=True",)}, {"cache_text_encoder_outputs": False}],
    ids=["states", "live"],
)
def test_encoders_stay_in_bf16(world, tmp_path, geforce, monkeypatch, changes):
    seen = []
    real = loop.forward_backward

    def step(run, *args, **more):
        parts = run.conditioning
        seen.append([run.dit.dtype, parts.dtype, parts.adapter.out_proj.weight.dtype])
        return real(run, *args, **more)

    monkeypatch.setattr(loop, "forward_backward", step)
    prompt = {"sample_prompt": "x --w 32 --h 32 --s 1 --d 3", "sample_at_first": True}
    result = trained(world, tmp_path, max_train_steps=1, **prompt, **changes)
    assert seen == [[torch.float16, torch.float16, torch.bfloat16]]
    assert len(list((tmp_path / "sample").iterdir())) == 1
    with safe_open(result.output, "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("why", ["cosine", "saturated", "overflow"])
def test_a_model_that_is_not_for_float16_is_trained_in_bf16(
    world, tmp_path, geforce, monkeypatch, why
):
    if why == "cosine":
        monkeypatch.setattr(guard, "LEAST_COSINE", 1.1)
    if why == "saturated":
        real = guard.first_gradients

        def cut(run):
            return replace(real(run), saturated={"blocks.1": int(run.options.sums == "short")})

        monkeypatch.setattr(guard, "first_gradients", cut)
    if why == "overflow":
        real = guard.forward_backward

        def overflow(run, *args, **more):
            group = real(run, *args, **more)
            if run.options.mixed_precision == "fp16":
                run.network.flat_grad[0] = math.inf
            return group

        monkeypatch.setattr(guard, "forward_backward", overflow)
    refused = trained(world, tmp_path / "refused")
    expected = {"cosine": "differ", "saturated": "most in blocks.1", "overflow": "not finite"}[why]
    line = "precision: bf16 instead of fp16: "
    assert line in console(tmp_path / "refused") and expected in console(tmp_path / "refused")
    run = json.loads((tmp_path / "refused" / "run.json").read_text())
    assert (run["precision"], run["sums"]) == ("bf16", "full") and sums._chain == 0
    # It is the run of bf16 by hand; later runs know, and `sample` takes bf16 too.
    by_hand = trained(world, tmp_path / "by_hand", mixed_precision="bf16")
    assert same_tensors(refused.output, by_hand.output)
    monkeypatch.setattr(guard, "first_gradients", never)
    again = trained(world, tmp_path / "again", max_train_steps=1)
    assert again.steps == 1 and line in console(tmp_path / "again")


def test_a_loss_scale_that_is_too_high_is_no_verdict(world, tmp_path, geforce, monkeypatch):
    real, scales = guard.forward_backward, []

    def overflow(run, *args, **more):
        group = real(run, *args, **more)
        scales.append(run.scaler.get_scale())
        if scales[-1] > 1000:
            run.network.flat_grad[0] = math.inf
        return group

    monkeypatch.setattr(guard, "forward_backward", overflow)
    trained(world, tmp_path, max_train_steps=1)
    assert scales[0] == 1.0 and scales[1] > 1000 >= scales[-1] > 1
    assert json.loads((tmp_path / "run.json").read_text())["precision"] == "fp16"


def test_nothing_random_moves():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with guard._nothing_changes(CPU):
        random.random(), np.random.rand(), torch.rand(3)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
