"""What surrounds a measurement on a card, tried without one: data, clocks, ceilings, tools."""

import dataclasses
import shutil
import subprocess
import sys
import time
import types

import pytest
import torch

from anima_fast.bench import loading, profile, step, step_models, times
from anima_fast.bench.choice import Choice
from anima_fast.bench.compare import compare
from anima_fast.bench.parity import Check
from anima_fast.bench.run_file import Run
from anima_fast.data.batches import Batches
from anima_fast.errors import UserError
from anima_fast.kernels import sums
from anima_fast.kernels.registry import OPS
from anima_fast.measure.card_state import CardState
from anima_fast.measure.rates import cold_and_warm
from anima_fast.measure.timer import Ceilings, Timer
from anima_fast.measure.warm import BATCH_S, LIMIT_S, Warmth

LATE = 0.03
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes of a card")


@pytest.fixture
def late(monkeypatch):
    """Every batch comes so many seconds late, of four steps."""
    original = Batches.iterate

    def iterate(self, *args, **kwargs):
        for batch in original(self, *args, **kwargs):
            time.sleep(LATE)
            yield batch

    monkeypatch.setattr(Batches, "iterate", iterate)
    monkeypatch.setattr(loading, "DIFFERENT", 2)
    monkeypatch.setattr(loading, "REPEATS", 2)


def tiny_bench():
    bench = step_models.Bench(step_models.CONFIG)
    bench.inputs = step_models.Inputs.random(step_models.CONFIG, 16, 3)
    return bench


@on_the_cpu
def test_a_step_waits_for_the_batches_of_the_trainers_loader(late):
    bench = tiny_bench()
    random = bench.inputs
    found = loading.waits(bench, 16, 3)
    assert len(found.whole) == len(found.waiting) == 3
    assert min(found.waiting) >= LATE and found.seconds >= LATE and 0 < found.share < 1
    for name in ("latents", "noise", "sigma", "context"):
        before, after = getattr(random, name), getattr(bench.inputs, name)
        assert (before.shape, before.dtype) == (after.shape, after.dtype), name
    assert not torch.equal(random.latents, bench.inputs.latents)


@on_the_cpu
def test_the_profile_of_the_step_shows_the_wait(late):
    text = profile.step_text(Choice(sizes={"L": 16}, providers=("eager",)))
    rows = {line.split()[2]: line for line in text.splitlines() if line.startswith("step eager")}
    assert list(rows) == ["forward", "backward", "optimize", "whole", "data"]
    assert float(rows["data"].split()[3]) >= 1e3 * LATE
    assert "of 3 steps is waiting for the next batch" in rows["data"]


@pytest.mark.parametrize(("op", "name"), [("step", "liger"), ("gelu", "sdpa-flash")])
def test_a_profile_of_a_provider_that_is_not_there_is_refused(op, name):
    with pytest.raises(UserError, match=f"{op} has no provider {name} here: use one of own, eager"):
        next(profile.calls(op, Choice(providers=(name,))))


# The card's state


class FakeNvml(types.ModuleType):
    """Two cards on bus 1, of domains 0 and 2; `clock` and `reasons` are those of the second."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")
        self.clock, self.reasons = 1980, 0x1

    def nvmlInit(self):
        pass

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetHandleByPciBusId(self, address):
        return {"00000000:01:00.0": "other", "00000002:01:00.0": "this"}[address]

    def nvmlDeviceGetClockInfo(self, handle, kind):
        assert handle == "this"
        return {1: self.clock, 2: 3201}[kind]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons

    def nvmlDeviceGetPowerUsage(self, handle):
        raise self.NVMLError("not supported")


@pytest.fixture
def nvml(monkeypatch):
    """A card in place of none."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    address = types.SimpleNamespace(pci_domain_id=2, pci_bus_id=1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: address)
    return fake


def test_the_state_is_that_of_the_card_of_cuda(nvml):
    found = CardState().describe()
    assert found == {
        "driver": "580.1", "power_limit_w": None, "clock_mhz": 1980, "memory_mhz": 3201,
        "power_w": None, "temperature_c": None, "slowed": False,
    }  # fmt: skip


@pytest.mark.parametrize(("reasons", "slowed"), [(0x1, False), (0x2, False), (0x4, True),
                                                 (0x21, True), (0x100, False)])  # fmt: skip
@pytest.mark.parametrize("name", ["Event", "Throttle"])
def test_a_card_that_is_slowed_is_noticed(nvml, name, reasons, slowed):
    setattr(nvml, f"nvmlDeviceGetCurrentClocks{name}Reasons", lambda handle: reasons)
    state = CardState()
    state.watch("own")
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0
    nvml.clock = 1900
    for name in ("own", "own", "eager"):
        state.watch(name)
    assert bool(state.note("own")) is slowed and not state.note("eager")
    assert state.seen("own") == {"clock_mhz": 1900.0} and state.seen("compile") == {}


def test_nothing_is_known_without_the_package(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    state = CardState()
    state.watch("own")
    assert (state.describe(), state.clock_mhz()) == ({}, None)
    assert (state.seen("own"), state.note("own")) == ({}, "")


def test_a_card_is_watched_while_it_works(monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("reached")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr("anima_fast.measure.timer.on_card", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("idle"))
    timer = Timer({"own": lambda: events.append("call")}, batch=2, flush=False,
                  watch=events.append)  # fmt: skip
    timer.round()
    calls = ["record", "call", "record"]
    assert events == ["idle", *calls, *calls, "reached", "own", "idle"]
    assert timer.seconds == {"own": [2e-3, 2e-3]}


# The ceilings of a warm card


class Products:
    """A card whose clock falls from 2000 MHz to `plateau` in so many seconds of work."""

    def __init__(self, plateau=1500, within_s=5.0, reads_clock=True):
        self.plateau, self.within_s, self.reads_clock = plateau, within_s, reads_clock
        self.now, self.runs = 0.0, []

    def clock(self):
        share = min(1.0, self.now / self.within_s)
        return 2000 + share * (self.plateau - 2000)

    def product(self, repeats):
        clock = self.clock()
        seconds = 4.0 / clock
        self.now += repeats * seconds
        self.runs.append(repeats)
        return seconds, clock if self.reads_clock else None

    def copy(self, repeats):
        return 1e-3, None

    def measured(self):
        return cold_and_warm(self.copy, self.product, lambda rates: None, now=lambda: self.now)


@pytest.mark.parametrize("reads_clock", [True, False])
def test_a_ceiling_is_taken_at_the_plateau(reads_clock):
    card = Products(reads_clock=reads_clock)
    found = card.measured()
    assert found.warmth.steady and card.within_s < found.warmth.seconds < LIMIT_S
    # Batches are of the length that a clock needs to show itself.
    assert {round(repeats * 4.0 / 2000, 1) for repeats in card.runs[2:-1]} == {BATCH_S}
    assert found.rates.tensor == pytest.approx(0.75 * found.cold.tensor, rel=0.01)
    assert found.rates.bandwidth == found.cold.bandwidth
    if reads_clock:
        assert found.clock_mhz == 1500 and found.cold_clock_mhz > 1980
    else:
        assert found.clock_mhz is found.cold_clock_mhz is None


def test_a_clock_that_does_not_settle_ends_the_warm_up():
    card = Products(plateau=500, within_s=100.0)
    found = card.measured()
    assert not found.warmth.steady and LIMIT_S <= found.warmth.seconds < LIMIT_S + 3 * BATCH_S


def test_the_rows_of_ceilings_hold_cold_and_warm():
    found = Products().measured()
    limits = Ceilings(found.rates.bandwidth, found.rates.tensor, None, found)
    copy, product = times.ceiling_rows(limits)
    assert (copy.op, product.op) == ("copy", "product") and not copy.note
    assert product.value == found.rates.tensor < product.parts["cold"] == found.cold.tensor
    assert product.parts["clock_mhz"] == 1500 < product.parts["cold_clock_mhz"]
    assert product.parts["warm_s"] == found.warmth.seconds
    moving = dataclasses.replace(found, warmth=Warmth(LIMIT_S, steady=False), clock_mhz=None)
    rows = times.ceiling_rows(dataclasses.replace(limits, measured=moving))
    assert all("not steady" in row.note and "clock_mhz" not in row.parts for row in rows)
    assert [row.parts for row in times.ceiling_rows(Ceilings(1.0, 2.0))] == [{}, {}]


def test_ceilings_of_two_runs_are_compared_by_the_warm_ones():
    slow = times.ceiling_rows(Ceilings(1.0, 2.0, None, Products().measured()))
    fast = times.ceiling_rows(Ceilings(1.0, 3.0, None, Products().measured()))
    found = {change.row.op: change for change in compare(Run({}, slow), Run({}, fast), {})}
    assert (found["product"].before, found["product"].after) == (2.0, 3.0)
    assert found["copy"].before == found["copy"].after


# The command lines of profilers


@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_a_profilers_command_line_runs_the_same_choice(tool, monkeypatch):
    choice = Choice(("gelu",), {"L": 4096, "B": 2}, ("float16",), ("compile",))
    words = profile.command(tool, "gelu", choice)
    assert words[0] == tool and sys.executable in words
    module = words.index("-m")
    assert words[module + 1] == "anima_fast.bench.profile"
    seen = []
    monkeypatch.setattr(profile, "calls", lambda op, choice: seen.append((op, choice)) or [])
    profile.main(words[module + 2 :])
    assert seen == [("gelu", choice)]


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_what_is_shown_can_be_typed(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "executable", "/with space/python")
    quote = {"linux": "'", "win32": '"'}[platform]
    text = profile.shown(profile.command("ncu", "gelu", Choice(sizes={"L": 8})))
    assert text.endswith(
        f"{quote}/with space/python{quote} -m anima_fast.bench.profile gelu --case=L=8"
    )


def test_a_tool_shows_one_provider(nvml):
    with pytest.raises(UserError, match="one --provider at a time"):
        profile.check("nsys", "gelu", Choice(providers=("own", "eager")))


def test_backward_stays_in_the_thread_of_the_range():
    seen = []
    profile.once(lambda: seen.append(torch.autograd.is_multithreading_enabled()))
    assert seen == [False] and torch.autograd.is_multithreading_enabled()


# Times


def test_running_out_of_memory_is_tried_again_when_its_tensors_are_gone(monkeypatch):
    tried = []

    def check(op, sizes, dtype, device):
        tried.append(sizes["H"])
        assert sys.exc_info()[0] is None
        if len(tried) == 1:
            raise torch.cuda.OutOfMemoryError
        return [Check(op.name, "", "", "", "out", 1e-3, 1e-3, 2e-3, 1)]

    monkeypatch.setattr(times, "check_op", check)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    op = OPS["attention"]
    sizes = {"B": 1, "L": 4, "S": 4, "H": 2, "K": 8}
    assert times.problem(op, op.function, sizes, torch.bfloat16) == ("", 1e-3)
    assert tried == [2, 1]
    tried.clear()
    why, error = times.problem(op, op.function, {**sizes, "H": 1}, torch.bfloat16)
    assert why == "out of memory" and error != error and tried == [1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@on_the_cpu
def test_backward_alone_of_compiled_code_is_timed():
    op = OPS["attention"]
    choice = Choice(providers=("compile",), modes=("bwd",), seconds=0.0)
    sizes = {"B": 1, "L": 4, "S": 6, "H": 2, "K": 8}
    rows = times._case_rows(op, "", sizes, torch.float32, choice, Ceilings(1.0, 1.0))
    timed = {row.provider: row for row in rows if row.metric == "time"}
    assert timed["compile"].samples and not timed["compile"].note


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(providers=("own",)), ["eager", *step.OWN, *step.HALF, "own none graphs"]),
        (Choice(providers=("compile",)), ["eager", "compile"]),
        (Choice(providers=("liger",)), []),
        (Choice(quick=True), ["eager", "own none"]),
        (Choice(quick=True, providers=("compile",)), []),
    ],
)
def test_the_step_of_eager_comes_with_those_that_must_agree_with_it(choice, expected):
    assert step.chosen_of(step.MODELS["anima"], choice) == expected


@on_the_cpu
def test_a_step_that_was_not_compared_says_so(monkeypatch):
    def fail(bench):
        if not bench.own:
            raise torch.cuda.OutOfMemoryError
        return original(bench)

    original = step.first_step
    monkeypatch.setattr(step, "first_step", fail)
    bench = tiny_bench()
    measured = step._size_rows(bench, ["eager", "own none"], 16, 3, Ceilings(1.0, 1.0), 0.0)
    rows = [row for some in measured for row in some if row.mode == "both"]
    notes = {row.provider: row.note for row in rows if row.metric == "time"}
    assert notes == {"eager": "out of memory", "own none": "not compared: eager's step failed"}


def test_moments_of_the_step_are_there_once():
    bench = step_models.Bench(step_models.TINY, rank=2, dtype=torch.float32)
    eager, own = (bench.optimizers[key].state for key in (False, True))
    assert eager.keys() == own.keys() and eager
    for p in own:
        for name in ("exp_avg", "exp_avg_sq"):
            assert eager[p][name].data_ptr() == own[p][name].data_ptr()
    bench.inputs = step_models.Inputs.random(step_models.TINY, 16, 1)
    for provider in ("eager", "own none"):
        bench.switch(provider)
        bench()
    assert len(eager) == len(own) and all(state["exp_avg"].any() for state in own.values())


@on_the_cpu
@pytest.mark.parametrize("policy", ["none", "block"])
def test_fp16_takes_turns_with_bf16(policy):
    """One DiT in both, whose weights come back as they were."""
    bench = step_models.Bench(step_models.TINY, rank=2, dtype=torch.bfloat16)
    bench.inputs = step_models.Inputs.random(step_models.TINY, 16, 2)
    drawn = {n: p.data.clone() for n, p in bench.dit.named_parameters()}
    found = {}
    for provider in ("eager", f"own {policy}", f"own {policy} fp16-short") * 2:
        bench.switch(provider)
        half = provider.endswith("short")
        assert (bench.dit.dtype, sums._chain) == (
            (torch.float16, 64) if half else (torch.bfloat16, 0)
        )
        assert (bench.dit.saturation is not None) == half
        found[provider] = step.first_step(bench)
        assert not step.disagreement(found[provider], found["eager"])
    assert len({loss for loss, _ in found.values()}) == 3
    bench.switch("eager")
    for name, parameter in bench.dit.named_parameters():
        torch.testing.assert_close(parameter.data, drawn[name], rtol=0, atol=2**-24)
    assert sums._chain == 0


def test_fp16_takes_turns_with_nothing_else():
    bench = step_models.Bench(step_models.TINY, rank=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="with bf16 alone"):
        bench.switch("own none fp16-short")


def test_graphs_of_one_size_are_no_memory_of_the_next():
    bench = step_models.Bench(step_models.TINY, rank=2, dtype=torch.float32)
    bench.switch("own none graphs")
    used = bench.dit.graphs
    bench.forget()
    assert used is not bench.graphs and bench.dit.graphs is None
    bench.switch("own none graphs")
    assert bench.dit.graphs is bench.graphs


# On a card


@pytest.mark.gpu
def test_the_package_finds_cudas_first_card():
    pynvml = pytest.importorskip("pynvml")
    state = CardState()
    assert state.clock_mhz() and state.describe()["driver"]
    assert pynvml.nvmlDeviceGetName(state._handle) == torch.cuda.get_device_name(0)


@pytest.mark.gpu
def test_proton_sees_forward_and_backward_below_the_call():
    lines = list(profile.under_proton("gelu", Choice(sizes={"L": 1024})))
    (scope,) = (i for i, line in enumerate(lines) if "gelu own" in line)
    depth = lines[scope].index("gelu own")
    for kernel in ("_gelu_fwd", "_gelu_bwd"):
        assert any(kernel in line and line.index(kernel) > depth for line in lines[scope:])


@pytest.mark.gpu
def test_a_tool_can_run_the_program():
    words = profile.command("ncu", "gelu", Choice(sizes={"L": 1024}, providers=("eager",)))
    assert subprocess.run(words[words.index(sys.executable) :]).returncode == 0


@pytest.mark.gpu
def test_memory_of_compiled_code_is_in_the_rows():
    op = OPS["gelu"]
    (sizes,) = list(op.real_shapes(1024).values())[:1]
    choice = Choice(providers=("compile",), seconds=0.1)
    rows = list(times._case_rows(op, "", sizes, torch.bfloat16, choice, Ceilings(1e12, 1e14)))
    found = {(row.provider, row.metric, row.mode) for row in rows if row.value is not None}
    for name in ("own", "eager", "compile"):
        assert {(name, "time", mode) for mode in times.MODES} <= found
        assert {(name, "kept", "both"), (name, "peak", "both")} <= found
