"""Run files and what reads them: measuring, comparing, history, profiles, exit statuses."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import torch
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from anima_fast.bench import (
    cases,
    command,
    commits,
    compare,
    errors,
    groups,
    run,
    sass,
    step,
    times,
)
from anima_fast.bench.choice import Choice, parse_choice
from anima_fast.bench.environment import ROOT, environment
from anima_fast.bench.history import history, history_page, read_runs, text_of
from anima_fast.bench.parity import relative_error
from anima_fast.bench.profile import tree_lines
from anima_fast.bench.providers import LIBRARIES, eager_of, libraries_of, load_candidate, providers
from anima_fast.bench.run_file import Measurement, Run, read_run, sampled, write_run
from anima_fast.bench.summary import summary
from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.kernels.registry import OPS
from anima_fast.measure.step_time import step_flops
from anima_fast.measure.timer import Ceilings, Timer

HERE = {"processor": "a", "torch": "2", "date": "2026-01-01T00:00:00+00:00", "commit": "a" * 12}
ERROR = Measurement("gelu", "error", 2e-7, "relative", dtype="float32", mode="out",
                    parts={"L=1 plain": 1e-7, "L=3 plain": 2e-7})  # fmt: skip
LAUNCHES = Measurement("block", "launches", 97.0, parts={"_gemm": 20.0, "cublas": 77.0})
TIME = sampled(Measurement("gelu", "time", None, "s", "L=4", provider="own", mode="fwd"),
               [1.0, 1.1, 0.9, 1.05, 0.95, 1.0])  # fmt: skip
REGISTERS = Measurement("gelu", "registers", 96.0, parts={"D=64": 96.0}, source="compiler")
FIRST = '{"format": "anima-fast run", "version": 1, "environment": {}}\n'
MODULES = Measurement("program", "modules", 2.0, parts={"rich": 1.0, "typer": 1.0})


def invoke(*words):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def changed(row, **parts):
    return dataclasses.replace(row, parts={**row.parts, **parts})


def compared(before, after, limits=(), **environment):
    a, b = Run(HERE, (before,)), Run({**HERE, **environment}, (after,))
    (change,) = compare.compare(a, b, compare.limits_of(limits))
    return change


# Run files


def test_a_run_file_holds_what_was_written(tmp_path):
    rows = (ERROR, LAUNCHES, TIME, dataclasses.replace(TIME, samples=(), value=None, note="out"))
    write_run(tmp_path / "a.jsonl", HERE, rows)
    found = read_run(tmp_path / "a.jsonl")
    assert (found.environment, found.rows, found.cut) == (HERE, rows, False)
    # Defaults are left out, so that a line of a baseline is short.
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert "samples" not in lines[1] and json.loads(lines[1])["parts"] == ERROR.parts


def test_a_run_file_that_was_killed_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    write_run(path, HERE, (ERROR, LAUNCHES))
    path.write_text(path.read_text()[:-20])
    found = read_run(path)
    assert found.rows == (ERROR,) and found.cut
    assert "cut off" in compare.notes_of(found, found)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"format": "anima', "is empty or cut"),
        ("{}\n", "is no run file"),
        ("not json\n", "line 1, is damaged"),
        ('{"format": "anima-fast run", "version": 9}\n', "has version 9"),
        ('{"format": "anima-fast run", "version": 1}\n', "line 1, has no environment"),
        (f"{FIRST}[1]\n", "line 2, is no JSON object"),
        (f'{FIRST}{{"op": 1}}\n', "line 2, is no measurement: its op is 1"),
        (f'{FIRST}{{"opp": 1}}\n', "its opp is 1"),
        (f'{FIRST}{{"op": "gelu", "metric": "error"}}\n', "op, metric or value lacks"),
        (f'{FIRST}{{"op": "a", "metric": "error", "value": "x"}}\n', "its value is 'x'"),
        (f'{FIRST}{{"op": "a", "metric": "error", "value": 1, "parts": 3}}\n', "its parts is 3"),
        (f'{FIRST}{{"op": "a", "metric": "error", "value": 1, "samples": ["x"]}}\n', "samples is"),
    ],
)
def test_what_is_no_run_file_is_one_line(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    done = invoke("compare", tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit | UserError)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "a.jsonl")


def test_the_environment_names_what_decides_digits():
    found = environment()
    assert found["torch"] == torch.__version__ and found["processor"] and found["instructions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", found["date"])


# Comparison


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (ERROR, ERROR, "same"),
        (ERROR, changed(ERROR, **{"L=1 plain": 1.04e-7}), "changed"),
        # One case of several, and not the worst of them.
        (ERROR, changed(ERROR, **{"L=1 plain": 1.36e-7}), "worse"),
        (ERROR, changed(ERROR, **{"L=1 plain": 0.5e-7}), "better"),
        (ERROR, changed(ERROR, **{"L=1 plain": float("nan")}), "lost"),
        (ERROR, changed(ERROR, **{"L=9 plain": 1e-7}), "only in the second"),
        (LAUNCHES, dataclasses.replace(LAUNCHES, value=98.0), "worse"),
        (LAUNCHES, dataclasses.replace(LAUNCHES, value=96.0), "better"),
        # A kernel under another name is no launch more.
        (LAUNCHES, dataclasses.replace(LAUNCHES, parts={"_gemm2": 20.0, "cublas": 77.0}),
         "only in the second"),
        (LAUNCHES, dataclasses.replace(LAUNCHES, value=None, parts={}, note="broke"), "lost"),
        (MODULES, changed(MODULES, torch=1.0), "worse"),
        # A kernel got a constant, and with it its variants other names.
        (REGISTERS, dataclasses.replace(REGISTERS, parts={"NEW=0": 96.0}), "only in the second"),
        (REGISTERS, dataclasses.replace(REGISTERS, parts={"NEW=0": 97.0}, value=97.0), "worse"),
        (dataclasses.replace(LAUNCHES, metric="loss", value=1.0, parts={}),
         dataclasses.replace(LAUNCHES, metric="loss", value=0.998, parts={}), "worse"),
        (dataclasses.replace(LAUNCHES, metric="occupancy", value=0.4, parts={}),
         dataclasses.replace(LAUNCHES, metric="occupancy", value=0.2, parts={}), "worse"),
    ],
)  # fmt: skip
def test_verdicts(before, after, verdict):
    change = compared(before, after)
    assert change.verdict == verdict
    assert compare.failed([change]) == (verdict in ("worse", "lost"))


@pytest.mark.parametrize(
    ("factor", "limit", "verdict"),
    [(1.0, "time:5%", "same"), (1.5, "time:5%", "worse"), (0.5, "time:5%", "better"),
     (1.5, "", "changed"), (1.5, "time:100%", "changed"), (1.001, "time:0", "worse")],
)  # fmt: skip
def test_times_are_worse_when_the_whole_interval_is(factor, limit, verdict):
    slower = sampled(TIME, [factor * s for s in TIME.samples])
    change = compared(TIME, slower, [limit])
    assert change.verdict == verdict and change.interval == pytest.approx((factor, factor))


def test_a_host_is_never_quite_as_fast_again():
    seconds = dataclasses.replace(TIME, op="program", metric="startup")
    for factor, verdict in ((1.1, "same"), (0.9, "same"), (1.8, "changed")):
        after = sampled(seconds, [factor * s for s in seconds.samples])
        assert compared(seconds, after).verdict == verdict


def test_noise_around_the_limit_is_not_red():
    noise = sampled(TIME, [1.3, 0.9, 1.2, 0.8, 1.25, 0.95])
    change = compared(TIME, noise, ["time:5%"])
    assert change.verdict == "same" and change.interval[0] < 1 < change.interval[1]


def test_errors_of_another_machine_have_more_room():
    before = changed(ERROR, **{"L=1 plain": 1e-5})
    after = changed(ERROR, **{"L=1 plain": 1.15e-5})
    assert compared(before, after).verdict == "worse"
    assert compared(before, after, processor="b").verdict == "changed"
    assert compared(before, changed(ERROR, **{"L=1 plain": 1.3e-5}), torch="3").verdict == "worse"
    # Of a few roundings two more are no slip there, and one here.
    few = changed(ERROR, **{"L=1 plain": 3e-7})
    assert compared(ERROR, few).verdict == "worse"
    assert compared(ERROR, few, processor="b").verdict == "changed"
    # A card chooses its libraries' kernels anew.
    on_card = dataclasses.replace(before, source="card")
    assert compared(on_card, dataclasses.replace(after, source="card")).verdict == "changed"
    # Counts are the same everywhere.
    more = dataclasses.replace(LAUNCHES, value=98.0)
    assert compared(LAUNCHES, more, processor="b").verdict == "worse"


def test_limits():
    found = compare.limits_of(["time:5% error:0.2", "registers:0"])
    assert (found["time"], found["error"], found["registers"]) == (0.05, 0.2, 0)
    assert found["launches"] == 0 and "time" not in compare.limits_of([])
    for words in ("time", "speed:5%", "time:-1%", "time:x"):
        with pytest.raises(UserError, match="--fail-if"):
            compare.limits_of([words])


def test_compare_says_what_moved_and_fails_by_its_limits(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows = (ERROR, LAUNCHES, TIME)
    write_run(a, HERE, rows)
    done = invoke("compare", a, a)
    assert done.exit_code == 0 and done.stdout == "3 measurements compared: 3 same\n"
    write_run(b, HERE, (changed(ERROR, **{"L=1 plain": 3e-7}), LAUNCHES, TIME))
    done = invoke("compare", a, b, "--html", tmp_path / "c.html")
    assert done.exit_code == 1 and "[L=1 plain]" in done.stdout and "x3" in done.stdout
    assert invoke("compare", a, b, "--fail-if", "error:300%").exit_code == 0
    page = (tmp_path / "c.html").read_text()
    assert "1 worse" in page and "L=1 plain" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)


def test_a_page_escapes_names(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_run(a, HERE, (dataclasses.replace(LAUNCHES, case="<b>"),))
    write_run(b, HERE, (dataclasses.replace(LAUNCHES, case="<b>", value=99.0),))
    invoke("compare", a, b, "--html", tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page


# Measuring


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "gelo"], "OP gelo"),
        (["run", "--metric", "speed"], "--metric speed"),
        (["run", "--dtype", "int8"], "--dtype int8"),
        (["run", "--case", "L"], "--case L"),
        (["run", "--case", "L=0"], "--case L=0"),
        (["run", "--provider", "magic"], "--provider magic"),
        (["run", "gelu", "--candidate", "nowhere.py:f"], "no file nowhere.py"),
        (["run", "gelu", "--candidate", "f"], "expected FILE.py:function"),
        (["run", "--candidate", "math:sqrt"], "the one op"),
        (["compare", "a.jsonl", "b.jsonl"], "neither a run file nor a commit"),
        (["history", "--folder", "nowhere"], "no folder"),
        (["profile", "gelu", "--tool", "magic"], "--tool magic"),
        (["profile", "program"], "no profile"),
    ],
)
def test_bad_words_are_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = invoke(*words)
    assert done.exit_code == 2 or isinstance(done.exception, UserError)
    assert message in str(done.exception) or message in done.output
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_measured_here_ends_with_one(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = invoke("run", "gelu", "--metric", "time", "--out", tmp_path / "a.jsonl")
    assert done.exit_code == 1 and "need a CUDA card" in done.stdout
    assert not (tmp_path / "a.jsonl").exists()


def test_rows_that_nobody_asked_for_are_left_out():
    times = [dataclasses.replace(TIME, provider=p) for p in ("own", "eager", "compile", "my:f")]
    choice = Choice(providers=("compile",), metrics=("time", "error"), modes=("fwd",))
    # A ratio needs ours and eager's.
    assert [row.provider for row in filter(choice.accepts, times)] == [
        "own", "eager", "compile", "my:f",
    ]  # fmt: skip
    gradient = dataclasses.replace(ERROR, mode="da", provider="compile")
    assert choice.accepts(dataclasses.replace(gradient, mode="out0"))
    assert not any(map(choice.accepts, (gradient, ERROR, LAUNCHES)))
    assert not Choice(dtypes=("float16",)).accepts(ERROR) and Choice(ops=("gelu",)).accepts(ERROR)
    assert groups.unmet(choice, times) == ["--metric error"]
    assert groups.unmet(Choice(providers=("liger",), ops=("block",)), times) == [
        "OP block", "--provider liger",
    ]  # fmt: skip


def test_what_is_wrong_and_what_is_only_told():
    note = "No available kernel"
    own, library = (
        dataclasses.replace(ERROR, provider=p, note=note) for p in ("own", "sdpa-flash")
    )
    slowed = dataclasses.replace(TIME, note="the card was slowed by heat or power")
    untimed = dataclasses.replace(
        TIME, value=None, samples=(), provider="own mlp", note="not timed"
    )
    spilled = Measurement("gelu", "registers", 255.0, note="gelu spills 8 bytes a thread")
    assert run.wrong([library, slowed, TIME, ERROR]) == []
    assert len(run.wrong([own, untimed, spilled])) == 3
    told = run.remarks([library, slowed, ERROR, own])
    assert len(told) == 2 and note in told[0] and "1 times: the card was slowed" in told[1]


def test_the_summary_fits_a_screen():
    providers = ("own", "eager", "compile", "my:f")
    rows = [
        dataclasses.replace(TIME, provider=p, case=f"L={n}", samples=(x * n,) * 3, value=x * n)
        for p, x in zip(providers, (1.0, 3.0, 2.0, 4.0), strict=True)
        for n in (1, 2)
    ]
    text = "\n".join(summary([*rows, ERROR, LAUNCHES, MODULES]))
    assert text.count("\n") < 15
    assert re.search(r"gelu  fwd   own +2  1000.000 to 2000.000 +3.00 +2.00", text)
    assert re.search(r"gelu  fwd   my:f .* 0.75 +0.50", text)


def test_baselines_are_compared_in_what_they_have():
    said = []
    loss = Measurement("loss", "loss", 1.0, parts={"step 1": 1.0}, mode="run")
    stored = [Run(HERE, (ERROR, loss), "a"), Run(HERE, (LAUNCHES,), "b")]
    quick = changed(ERROR, **{"L=7 plain": 1.0})
    now = Run(HERE, (quick, LAUNCHES, MODULES))
    assert command.say_changes(stored, now, whole=False, say=said.append)
    assert "in no baseline: program modules" in said and "2 measurements" not in "".join(said)
    worse = dataclasses.replace(LAUNCHES, value=98.0)
    assert not command.say_changes(stored, Run(HERE, (worse,)), whole=False, say=said.append)


def test_groups_measure_every_metric():
    measured = {metric for group in groups.GROUPS for metric in group.metrics}
    # The memory of a process is measured by benchmarks/vae_encode.py.
    assert measured == set(compare.METRICS) - {"resident"}
    able, lacking = groups.chosen(Choice(ops=("program",)))
    assert [group.name for group in able] == ["program", "startup"] and not lacking
    able, _ = groups.chosen(Choice(ops=("program",), quick=True))
    assert [group.name for group in able] == ["program"]


PRINTS = """
from anima_fast.bench.run_file import *
print(row_line(Measurement("gelu", "launches", 1.0)), end="", flush=True)
print("noise", file=__import__("sys").stderr)
"""


@pytest.mark.parametrize(
    ("code", "ends"),
    [("", ""), ("raise SystemExit(3)", "noise"), ("1 / 0", "ZeroDivisionError: division by zero")],
)
def test_a_group_that_fails_is_told_and_keeps_its_rows(tmp_path, monkeypatch, code, ends):
    command = [sys.executable, "-c", PRINTS + code]
    monkeypatch.setattr(run, "command", lambda *_: command)
    said = []
    chosen = groups.GROUPS[:2]
    rows, problems = run.run_groups(chosen, Choice(), tmp_path / "a.jsonl", say=said.append)
    assert len(rows) == 2 and read_run(tmp_path / "a.jsonl").rows == tuple(rows)
    assert len(problems) == (2 if ends else 0) and all(ends in why for why in problems)
    assert len(said) == 2 and "1 rows" in said[0]


def test_a_group_that_hangs_is_stopped(tmp_path, monkeypatch):
    command = [sys.executable, "-c", PRINTS + "import time; time.sleep(60)"]
    monkeypatch.setattr(run, "command", lambda *_: command)
    monkeypatch.setattr(run, "LIMIT_S", 6.0)
    start = time.monotonic()
    rows, problems = run.run_groups(
        groups.GROUPS[:1], Choice(), tmp_path / "a.jsonl", say=lambda _: None
    )
    assert rows and "stopped" in problems[0] and time.monotonic() - start < 50


def test_run_against_a_baseline(tmp_path):
    """The real program: packages that --help imports, then a baseline that lacks one of them."""
    path = tmp_path / "a.jsonl"
    words = ["run", "program", "--metric", "modules", "--out"]
    done = invoke(*words, path)
    assert done.exit_code == 0 and "2 measurements" in done.stdout
    found = read_run(path)
    row = found.rows[0]
    assert row.parts["rich"] == 1 and "torch" not in row.parts and "triton" not in row.parts
    fewer = {name: 1.0 for name in row.parts if name != "rich"}
    write_run(path, found.environment, [dataclasses.replace(row, parts=fewer)])
    done = invoke(*words, tmp_path / "b.jsonl", "--against", path)
    assert done.exit_code == 1 and "worse" in done.stdout and "[rich]" in done.stdout


def test_timer_alternates_and_leaves_out_what_fails():
    turns = []
    timer = Timer({"a": lambda: turns.append("a"), "b": lambda: turns.append("b"),
                   "c": lambda: 1 / 0}, before={"b": lambda: turns.append("before b")})  # fmt: skip
    timer.warm(1)
    turns.clear()
    for _ in range(2):
        timer.round()
    batch = len(timer.seconds["a"]) // 2
    assert turns == 2 * (["a"] * batch + ["before b"] + ["b"] * batch)
    assert timer.failed == {"c": "ZeroDivisionError: division by zero"}
    assert all(second >= 0 for samples in timer.seconds.values() for second in samples)


# Providers and candidates


@pytest.mark.parametrize("name", OPS)
def test_providers_compute_the_op(name):
    op = OPS[name]
    torch.manual_seed(0)
    inputs = op.make_inputs(op.shapes[:3][-1], torch.float32, "cpu")
    found = op.reference(**inputs)
    expected = found if isinstance(found, tuple) else (found,)
    for provider, call in providers(op).items():
        if provider in ("own", "compile", "sdpa-cudnn", "sdpa-efficient", "flash-attn", "xformers"):
            continue
        values = call(**inputs)
        for value, exact in zip(values if isinstance(values, tuple) else (values,), expected,
                                strict=True):  # fmt: skip
            assert relative_error(value, exact) < 1e-5, provider
    assert set(libraries_of(op)) <= {*providers(op), "flash-attn", "xformers", "liger"}


def test_short_sums_have_the_rivals_of_their_op():
    """Eager's own call, and not the float32 definition, which would be easy to beat."""
    assert libraries_of(OPS["attention_short"]).keys() == LIBRARIES["attention"].keys()
    op, torch_calls = OPS["attention_short"], []
    inputs = op.make_inputs(op.shapes[0], torch.float16, "cpu")
    with TorchFunctionCalls(torch_calls):
        eager_of(op)(**inputs)
    assert "scaled_dot_product_attention" in torch_calls


class TorchFunctionCalls(TorchFunctionMode):
    """Notes the names of torch's functions that are called inside."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def test_the_time_of_the_host_is_taken(tmp_path):
    """It replaces functions of the kernels, whose arguments change."""
    words = ["-m", "benchmarks.host_time", "--rounds", "1", "--out", tmp_path / "a.jsonl"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {(row.metric, row.provider): row for row in read_run(tmp_path / "a.jsonl").rows}
    assert rows["launches", "own none"].parts["triton"] > 0


def test_pytest_benchmark_runs_every_entry_of_an_op():
    """Its own process: the folder is no part of the tests, and nothing else would import it."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_ops.py", "-k", "gelu"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "6 passed, 3 skipped" in done.stdout


CANDIDATE = """
import torch
def right(a):
    return torch.nn.functional.gelu(a)
def wrong(a):
    return torch.nn.functional.gelu(a, approximate="tanh")
def nothing(a):
    return None
def two(a):
    return right(a), right(a)
def forward(a):
    return right(a.detach())
"""


def test_a_candidate_is_timed_when_it_is_right(tmp_path):
    (tmp_path / "my.py").write_text(CANDIDATE)
    sizes = {"L": 40, "D": 24}
    choice = Choice(ops=("gelu",), sizes=sizes, providers=("own",), dtypes=("float32",),
                    modes=("fwd", "bwd"), metrics=("time",), seconds=0.0)  # fmt: skip
    found = {}
    for name in ("right", "wrong"):
        one = dataclasses.replace(choice, candidate=f"{tmp_path / 'my.py'}:{name}")
        found |= {row.key: row for rows in times.rows(one) for row in rows}
    timed = {row.provider for row in found.values() if row.samples}
    assert timed == {"own", "eager", "my:right"}
    (why,) = {row.note for row in found.values() if row.provider == "my:wrong"}
    assert "not right" in why
    row = next(r for r in found.values() if r.samples and r.provider == "own" and r.mode == "bwd")
    assert row.case == "B=1 L=40 D=24" and row.parts["share_of_ceiling"] > 0


def test_a_candidate_is_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text("def gelu(a):\n    return a\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    choice = parse_choice(["gelu"], candidate="my.py:gelu")
    monkeypatch.chdir("/")
    assert list(load_candidate(choice.candidate)) == ["my:gelu"]


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("right", {}, ""),
        ("wrong", {}, "allowed"),
        ("nothing", {}, "has no attribute"),
        ("two", {}, "the definition out, da"),
        ("forward", {}, "--mode fwd"),
        ("forward", {"modes": ("fwd",)}, ""),
        ("right", {"sizes": {"L": 4, "D": 24}, "dtypes": ("float16", "float64")}, ""),
    ],
)
def test_a_candidate_is_held_to_the_table_without_a_card(tmp_path, name, changes, says):
    (tmp_path / "my.py").write_text(CANDIDATE)
    choice = Choice(ops=("gelu",), quick=True, candidate=f"{tmp_path / 'my.py'}:{name}")
    choice = dataclasses.replace(choice, **changes)
    found = [row for rows in errors.rows_of(choice) for row in rows]
    own = [row for row in found if row.provider == f"my:{name}"]
    assert bool(run.wrong(found)) == bool(says) and not run.wrong(found_of(found, "own"))
    assert any(says in row.note for row in own) if says else not any(row.note for row in own)
    if choice.sizes:
        assert {(row.case, row.dtype) for row in own} == {("L=4 D=24", "float16")}
        assert {part for row in own for part in row.parts} == {"B=1 L=4 D=24 plain"}
    if choice.modes:
        assert {row.mode for row in own} == {"out"}


def found_of(rows, provider):
    return [row for row in rows if row.provider == provider]


def test_a_candidate_may_be_in_an_installed_package():
    assert list(load_candidate("math:sqrt")) == ["math:sqrt"]
    with pytest.raises(UserError, match="no function"):
        load_candidate("math:nothing")


def test_cases_take_sizes_from_the_command_line():
    choice = parse_choice(["lora_linear"], cases=["L=1024,B=2"], dtypes=["float16"])
    found = dict(cases.chosen_cases(OPS["lora_linear"], choice))
    assert found["qkv"]["M"] == 2048 and found["text kv"]["M"] == 96
    assert [s["S"] for _, s in cases.chosen_cases(OPS["attention"], choice)] == [1024, 96]
    assert cases.timed_dtypes(OPS["lora_linear"], choice) == [torch.float16]


# The step


def test_the_step_is_timed_when_loss_and_gradients_are_eagers():
    eager = (1.0, torch.tensor([1.0, 2.0]))
    assert step.disagreement(eager, None) == step.disagreement(eager, eager) == ""
    assert "loss" in step.disagreement((1.1, eager[1]), eager)
    assert "loss" in step.disagreement((float("nan"), eager[1]), eager)
    assert "gradients" in step.disagreement((1.0, torch.tensor([1.0, 1.0])), eager)


def test_step_rows_on_a_tiny_model():
    if torch.cuda.is_available():
        pytest.skip("sizes of a card")
    bench = step.Bench(step.CONFIG)
    bench.inputs = step.Inputs.random(step.CONFIG, 16, 1)
    names = ["eager", "own none", "own no-policy"]
    measured = step._size_rows(bench, names, 16, 1, Ceilings(1e9, 1e9), 0.0)
    found = [row for rows in measured for row in rows]
    timed = {row.provider for row in found if row.samples}
    assert timed == {"eager", "own none"}
    assert {row.mode for row in found if row.provider == "own none"} == {
        "both", "forward", "backward", "optimize",
    }  # fmt: skip
    assert next(row for row in found if row.provider == "own no-policy").note


def test_step_operations_are_those_of_the_eager_step():
    """The formula behind MFU against torch's counter, AdaLN and attention's zero key apart."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from anima_fast.bench import step_models as models

    config, tokens, batch, text = models.TINY, 16, 2, models.TEXT_ROWS
    bench = models.Bench(config, rank=4, dtype=torch.float32)
    bench.inputs = models.Inputs.random(config, tokens, batch)
    if bench.dit.x_embedder.proj[1].weight.is_cuda:
        pytest.skip("sizes of a card; the formula is the same")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, depth=3) as counter:
        bench()
    counted = sum(
        count
        for name, counts in counter.get_flop_counts().items()
        if re.fullmatch(r"AnimaDiT.blocks.\d+", name)
        for count in counts.values()
    )
    d, rank, blocks = config.model_channels, config.adaln_rank, config.num_blocks
    adaln = 3 * 2 * batch * rank * (d + 3 * d)
    zero_key = 2 * 6 * batch * tokens * d
    expected = step_flops(config, tokens, batch, 4, text)
    assert counted - blocks * (adaln + zero_key) == expected


# History


def made_runs(folder, values):
    for i, value in enumerate(values):
        where = {**HERE, "date": f"2026-01-0{i + 1}T00:00:00+00:00", "commit": f"{i}" * 12}
        rows = (dataclasses.replace(LAUNCHES, value=value), TIME)
        write_run(folder / f"{9 - i}.jsonl", where, rows)


def test_history_names_the_first_commit_that_stepped(tmp_path):
    made_runs(tmp_path, [97.0, 97.0, 98.0, 98.0])
    runs = read_runs(tmp_path)
    found = history(runs, Choice())
    assert [line.step for line in found] == [2, None]
    text = list(text_of(found[:1]))
    assert len(text) == 5 and "222222222" in text[3] and text[3].endswith("<- worse")
    history_page(tmp_path / "h.html", runs, found)
    page = (tmp_path / "h.html").read_text()
    assert "git bisect start 222222222 111111111" in page and page.count("<svg") == 2
    done = invoke("history", "block", "--folder", tmp_path)
    assert done.exit_code == 0 and "stepped" in done.stdout and "gelu" not in done.stdout


def test_history_sees_a_case_that_is_not_the_worst(tmp_path):
    for i, error in enumerate((1e-7, 1e-7, 1.4e-7)):
        where = {**HERE, "date": f"2026-01-0{i + 1}", "commit": f"{i}" * 12}
        write_run(tmp_path / f"{i}.jsonl", where, [changed(ERROR, **{"L=1 plain": error})])
    (line,) = history(read_runs(tmp_path), Choice())
    assert line.step == 2 and list(text_of([line]))[3].endswith("<- worse [L=1 plain] +40 %")


def test_history_leaves_other_machines_apart(tmp_path):
    made_runs(tmp_path, [97.0])
    write_run(tmp_path / "x.jsonl", {**HERE, "processor": "b"}, (LAUNCHES, TIME))
    assert len(history(read_runs(tmp_path), Choice(ops=("block",)))) == 2


# Commits


@pytest.fixture
def repository(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(commits, "ROOT", tmp_path)
    return tmp_path


def test_a_commit_without_the_command_is_a_named_error(repository):
    with pytest.raises(UserError, match="older than `bench run`"):
        commits.run_both(("HEAD", "HEAD"), [], Choice(), say=print)
    assert len(subprocess.run(["git", "-C", str(repository), "worktree", "list"],
                              capture_output=True, text=True).stdout.splitlines()) == 1  # fmt: skip
    with pytest.raises(UserError, match="neither a run file nor a commit"):
        commits.run_both(("nothing", "HEAD"), [], Choice(), say=print)


def test_two_commits_are_measured_in_turn(repository, monkeypatch):
    place = repository / "anima_fast/bench/groups.py"
    place.parent.mkdir(parents=True)
    for value in (1.0, 2.0):
        place.write_text(f"VALUE = {value}\n")
        git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    turns = []

    def measured(chosen, choice, path, *, root, say):
        value = float((root / "anima_fast/bench/groups.py").read_text().split("=")[1])
        turns.append((chosen[0].name, value))
        write_run(path, HERE, [sampled(TIME, [value, value]), dataclasses.replace(
            LAUNCHES, value=value)])  # fmt: skip
        return [], []

    monkeypatch.setattr(commits, "run_groups", measured)
    two = [groups.Group("a", (), ""), groups.Group("b", (), "", turns=True)]
    a, b = commits.run_both(("HEAD~1", "HEAD"), two, Choice(), say=print)
    assert turns == [("a", 1.0), ("a", 2.0)] + 3 * [("b", 1.0), ("b", 2.0)]
    assert a.by_key()[TIME.key].samples == (1.0,) * 8 and b.name == "HEAD"
    found = {c.row.metric: c.verdict for c in compare.compare(a, b, compare.limits_of(["time:5%"]))}
    assert found == {"time": "worse", "launches": "worse"}


def test_a_group_that_the_older_commit_lacks_is_left_out(repository, monkeypatch):
    place = repository / "anima_fast/bench/groups.py"
    place.parent.mkdir(parents=True)
    place.write_text("")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    fails = {("new", "0")}

    def measured(chosen, choice, path, *, root, say):
        write_run(path, HERE, [LAUNCHES])
        return [], ["it failed"] if (chosen[0].name, root.name) in fails else []

    monkeypatch.setattr(commits, "run_groups", measured)
    two = [groups.Group(name, (), "") for name in ("new", "old")]
    said = []
    a, b = commits.run_both(("HEAD", "HEAD"), two, Choice(), say=said.append)
    assert a.rows == b.rows == (LAUNCHES,) and said == ["HEAD: new is left out"]
    fails.add(("old", "1"))
    with pytest.raises(UserError, match="it failed"):
        commits.run_both(("HEAD", "HEAD"), two, Choice(), say=said.append)


# Profiles

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R7], [R4.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/             @UP1  HMMA.16816.F16 R4, R8, R12, R4 ;
        /*0050*/                   NOP;
"""


def test_instructions_are_counted_by_class():
    assert sass.counts(SASS) == {
        "other": 1, "load 128": 1, "asynchronous copy 128": 1, "HMMA F32": 1, "HMMA F16": 1,
    }  # fmt: skip
    names = {
        "LDG.E.U16": "load 32 or less", "STG.E.64": "store 64", "LDSM.16.M88.4":
        "shared load, matrix", "BAR.SYNC.DEFER_BLOCKING": "barrier", "IMMA.16832.S8.S8": "IMMA",
        "HGMMA.64x128x16.F32.BF16": "HGMMA F32", "LDGSTS.E": "asynchronous copy 32 or less",
        "DEPBAR.LE": "wait for copies", "LDL.LU": "local memory", "MUFU.EX2": "special function",
        "FFMA": "float arithmetic", "F2FP.BF16.PACK_AB": "conversion", "SHFL.BFLY": "between lanes",
    }  # fmt: skip
    assert {name: sass.class_of(name) for name in names} == names


def test_protons_tree_is_printed_longest_first():
    leaf = {"frame": {"name": "k"}, "metrics": {"time (ns)": 2000.0, "count": 3}, "children": []}
    more = {**leaf, "frame": {"name": "m"}, "metrics": {"time (ns)": 5000.0, "count": 1}}
    tree = {"frame": {"name": "ROOT"}, "metrics": {}, "children": [leaf, more]}
    assert [line.split() for line in tree_lines(tree)] == [
        ["7.0", "us", "ROOT"], ["5.0", "us", "1", "m"], ["2.0", "us", "3", "k"],
    ]  # fmt: skip


@pytest.mark.parametrize("tool", ["proton", "ncu", "nsys"])
def test_a_tool_that_is_missing_is_told_with_what_to_type(tool):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = invoke("profile", "gelu", "--tool", tool)
    assert done.exit_code == 2 and "needs a CUDA card; there: " in done.output
