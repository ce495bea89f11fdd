"""The benchmark suite without its measurements: arithmetic, rows, slices, the report, refusals."""

import csv
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.files import check_folder
from anima_fast.kernels.registry import OPS
from anima_fast.measure.step_time import step_flops
from anima_fast.measure.timer import Timer
from benchmarks import compare, suite
from benchmarks.charts import Bar, bars, number, roofline
from benchmarks.rows import (
    COLUMNS,
    Row,
    append_row,
    machine,
    quantile,
    read_rows,
    spread,
    throughput,
    write_rows,
)
from benchmarks.suite_report import build_report

CARD = {
    "card": "Made-up card",
    "torch": "9.9",
    "triton": "8.8",
    "commit": "abc",
    "date": "2000-1-1",
}
BANDWIDTH, PEAK = 1e12, 1e14


def made_up_rows(tokens=4096):
    """Rows as a card would give them: ours twice as fast as eager, step and memory included."""
    rows = [
        Row("copy", "torch", "ceiling", gb_s=BANDWIDTH / 1e9),
        Row("product", "torch", "ceiling", tflop_s=PEAK / 1e12),
    ]
    for op in OPS.values():
        for label, sizes in op.real_shapes(tokens).items():
            shape = " ".join(f"{k}={v}" for k, v in sizes.items())
            cost = op.cost(sizes, 2)
            for both, mode in enumerate(("forward", "forward+backward")):
                moved = cost.forward_bytes + both * cost.backward_bytes
                flops = cost.forward_flops + both * cost.backward_flops
                least = max(moved / BANDWIDTH, flops / PEAK)
                for provider, factor in (("eager", 3.0), ("compiled", 2.0), ("ours", 1.5)):
                    rates = throughput(factor * least, moved, flops, bandwidth=BANDWIDTH, peak=PEAK)
                    ms = 1e3 * factor * least
                    rows.append(
                        Row(op.name, provider, mode, f"{label}: {shape}" if label else shape,
                            "bfloat16", 0.9 * ms, ms, 1.2 * ms, "ms", tokens=tokens, **rates)
                    )  # fmt: skip
    shape = f"B=1 L={tokens} S=96 R=32"
    plain = Row("step", "", "step", shape, "bfloat16", unit="s", tokens=tokens, batch=1)
    for provider, s in (("eager", 1.5), ("compiled", 1.2), ("ours none", 0.9), ("ours mlp", 1.0)):
        one = replace(plain, provider=provider)
        rows.append(replace(one, p20=0.98 * s, p50=s, p80=1.03 * s))
        rows.append(replace(one, mode="images", p50=1 / s, unit="images/s"))
        rows.append(replace(one, mode="mfu", p50=0.3 / s, unit="share"))
        rows.append(replace(one, mode="peak", p50=8 * s, unit="GiB"))
        for phase, ms in (("forward", 300), ("backward", 600), ("optimize", 2)):
            rows.append(replace(one, mode=phase, p50=ms * s, unit="ms"))
            rows.append(replace(one, mode=f"{phase} launches", p50=9 * ms, unit="launches"))
    rows.append(replace(plain, provider="diffusers", note="out of memory"))
    for provider, units in (("eager", 29.5), ("ours none", 13.4), ("ours mlp", 9.4)):
        one = Row("block", provider, "saved", shape, tokens=tokens)
        rows.append(replace(one, p50=units, unit="units"))
        rows.append(replace(one, p50=16 * units, unit="MiB"))
    return [replace(row, **CARD) for row in rows]


def made_up_folder(folder, rows=None):
    """An output folder: parity of gelu passed, of attention failed, ops passed, steps stopped."""
    rows = made_up_rows() if rows is None else rows
    check = {
        "op": "gelu", "shape": "L=1", "dtype": "bfloat16", "layout": "plain", "tensor": "out",
        "error": 1e-3, "reference_error": 1e-3, "allowed": 3e-3, "remark": "", "passed": True,
    }  # fmt: skip
    wrong = check | {"op": "attention", "error": float("inf"), "passed": False}
    state = {
        "parity-gelu": ("passed", ""),
        "parity-attention": ("failed", "1 check <wrong>"),
        "ops-4096": ("passed", ""),
        "step-1024-b1": ("timed out", "stopped after 540 s"),
    }
    known = {one.name: one for one in suite.slices()}
    for name, (status, reason) in state.items():
        record = {"name": name, "title": known[name].title, "status": status, "seconds": 12.3,
                  "returncode": 0, "reason": reason, **CARD}  # fmt: skip
        path = folder / "slices" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    (folder / "slices/parity-gelu.out").write_text(json.dumps([check]))
    (folder / "slices/parity-attention.out").write_text(json.dumps([wrong]))
    (folder / "slices/step-1024-b1.log").write_text("the <last> line")
    write_rows(folder / "slices/ops-4096.csv", rows)
    return folder


def test_quantiles():
    assert quantile([3, 1, 2], 0.5) == 2 and quantile([4.0], 0.2) == 4
    assert quantile([0, 10], 0.2) == 2 and quantile([0, 1, 2, 3, 4, 5], 0.8) == 4
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 10) == {"p20": 20, "p50": 35, "p80": 50}
    with pytest.raises(ValueError):
        quantile([], 0.5)


def test_throughput():
    # 1 GB in 2 ms; the copy reaches 1 TB/s, so 1 ms is the least.
    found = throughput(2e-3, 1e9, 0, bandwidth=1e12, peak=1e14)
    assert found == {"gb_s": pytest.approx(500), "tflop_s": None, "share_of_ceiling": 0.5}
    # 400 GFLOP at 100 TFLOP/s take 4 ms: the product bounds, not the memory.
    found = throughput(5e-3, 1e9, 4e11, bandwidth=1e12, peak=1e14)
    assert found["tflop_s"] == pytest.approx(80) and found["share_of_ceiling"] == pytest.approx(0.8)
    assert throughput(1.0, 0, 0, bandwidth=1, peak=1)["share_of_ceiling"] is None


def test_numbers():
    assert [number(x) for x in (0, None, float("inf"), 1234.6, 12.345, 0.012345)] == [
        "0", "–", "–", "1235", "12.3", "0.0123",
    ]  # fmt: skip


def test_rows_survive_a_file(tmp_path):
    path, rows = tmp_path / "a" / "rows.csv", made_up_rows()
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    required = "op provider mode shape dtype p20 p50 p80 unit gb_s tflop_s share_of_ceiling card"
    assert list(COLUMNS[:17]) == f"{required} torch triton commit date".split()
    # A line that a kill cut off is left out.
    path.write_text(path.read_text()[:-60])
    assert read_rows(path) == rows[:-1]
    path.write_text("op,provider\n")
    with pytest.raises(UserError, match="other columns"):
        read_rows(path)
    assert read_rows(tmp_path / "none.csv") == []


def test_machine_is_told():
    where = machine()
    assert where["torch"] == torch.__version__ and re.fullmatch(r"\d{4}-\d\d-\d\d", where["date"])
    assert torch.cuda.is_available() or where["card"].startswith(compare.CPU_PREFIX)


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


def test_step_operations_are_those_of_the_eager_step():
    """The formula behind MFU against torch's counter, AdaLN and attention's zero key apart."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import step_models as models

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


def test_comparisons():
    rows = made_up_rows()
    one = next(c for c in compare.op_comparisons(rows) if c.op == "gelu")
    assert one.speedup("eager") == pytest.approx(2.0) and one.speedup("library") is None
    assert compare.ceilings_of(rows) == (BANDWIDTH, PEAK) and compare.ceilings_of([]) is None
    assert compare.label_of("qkv: M=1 N=2") == "qkv" and compare.label_of("M=1") == ""
    assert compare.rank_of("B=1 L=4 S=9 R=32") == 32 and compare.rank_of("") is None


def test_predictions_stand_beside_measurements():
    ops = compare.predicted_ops(made_up_rows())
    names = {op["op"] for op in ops}
    # All but the one over adapter states, whose sizes differ.
    assert names == set(OPS) - {"adamw"}
    for op in ops:
        # Made 1.5 times the least time; the model adds a launch.
        assert op["predicted"] < op["measured"] + 0.01
        assert op["predicted"] > op["measured"] / 1.5
    steps = compare.predicted_steps(made_up_rows())
    assert [s["recompute"] for s in steps] == ["none", "mlp"]
    assert all(s["predicted_s"] > 0 and s["measured_gib"] for s in steps)
    assert compare.predicted_ops([]) == compare.predicted_steps([]) == []


def test_charts_are_svg():
    drawn = [
        bars("a < b", {"x & y": [Bar("eager", 2.0, 1.9, 2.2), Bar("ours", 0.0)]}, "s", limit=3.0),
        roofline("roof", [("ours", "x <y>", 10.0, 1e12), ("eager", "z", 1e4, 9e13)], 1e12, 1e14),
    ]
    for svg in drawn:
        ElementTree.fromstring(svg)
    assert bars("none", {}, "s") == roofline("none", [], 1.0, 1.0) == ""


def test_slices():
    found = suite.slices()
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    assert {f"parity-{op}" for op in OPS} <= set(names)
    assert {"gpu-tests", "ops-9216", "memory-4096", "step-1024-b4", "resources",
            "sanitizer-memcheck"} <= set(names)  # fmt: skip
    assert all(one.limit_s <= 540 for one in found)
    wanted = suite.CPU if torch.cuda.is_available() else suite.GPU
    assert wanted not in {one.where for one in suite.choose([])}
    with pytest.raises(UserError, match="--slice nothing is unknown"):
        suite.choose(["nothing"])


def run(command, folder, **changes):
    one = suite.Slice("parity-gelu", "a made-up slice", tuple(command), **changes)
    check_folder(folder / "slices")
    (record,) = suite.run_slices([one], folder, say=lambda line: None)
    assert (
        json.loads((folder / "slices/parity-gelu.json").read_text())["status"] == record["status"]
    )
    return record


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("print('[]')", "passed", ""),
        ("import sys; print('x\\n= it is broken =', file=sys.stderr); sys.exit(3)", "failed",
         "it is broken"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "exit status -11"),
    ],
)  # fmt: skip
def test_how_a_slice_ends(tmp_path, code, status, reason):
    record = run(["python", "-c", code], tmp_path)
    assert (record["status"], record["reason"]) == (status, reason)


def test_a_slice_is_stopped_with_all_it_started(tmp_path):
    code = (
        "import subprocess, sys, time; print('[1]', flush=True);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, file=sys.stderr, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    record = run(["python", "-c", code], tmp_path, limit_s=1.5)
    assert time.monotonic() - start < 55, "it did not wait for the child"
    assert record["status"] == "timed out" and "stopped after 2 s" in record["reason"]
    assert (tmp_path / "slices/parity-gelu.out").read_text() == "[1]\n"
    child = int((tmp_path / "slices/parity-gelu.log").read_text())
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")


def test_what_cannot_run_here_is_skipped_with_its_reason(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    record = run(["python", "-c", "1/0"], tmp_path, where=suite.GPU)
    assert record["status"] == "skipped" and "no" in record["reason"]
    assert record["seconds"] == 0


def page_of(folder):
    build_report(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_report(tmp_path):
    page = page_of(made_up_folder(tmp_path))
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    assert "http" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S) and "<script" not in page
    assert "failed: parity-attention, step-1024-b1" in page
    assert "1 check &lt;wrong&gt;" in page and "the &lt;last&gt; line" in page
    assert "Predicted and measured" in page and "Seconds per step" in page
    assert "No CUDA card" not in page
    # Speed-ups only where parity is green: gelu's is, attention's failed, others have not run.
    cells = dict(re.findall(r"^<tr><td>(.*?)</td><td>forward</td>(.*)$", page, re.M))
    assert "2.00" in cells["gelu"] and "no parity" not in cells["gelu"]
    assert "no parity" in cells["attention self"] and "no parity" in cells["rmsnorm text"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == len(made_up_rows()) and len(results["parity"]) == 2
    with open(tmp_path / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"])


def test_cpu_rows_pretend_nothing(tmp_path):
    rows = [replace(row, card=f"{compare.CPU_PREFIX}slow") for row in made_up_rows()]
    folder = made_up_folder(tmp_path, rows)
    for path in (folder / "slices").glob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"card": f"{compare.CPU_PREFIX}slow"}))
    page = page_of(folder)
    assert "No CUDA card" in page and "Predicted and measured" not in page
    assert "× eager" not in page


def test_an_empty_folder_has_a_report(tmp_path):
    assert "nothing has run" in page_of(tmp_path)
    # All three files exist, as the command says.
    assert read_rows(tmp_path / "results.csv") == []
    assert (tmp_path / "results.csv").read_text().split(",")[0] == "op"
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_rows_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, rows = tmp_path / "rows.csv", made_up_rows()
    write_rows(path, rows)
    for row in rows:
        append_row(tmp_path / "one_by_one.csv", row)
    assert path.read_bytes() == (tmp_path / "one_by_one.csv").read_bytes()
    assert read_rows(path) == rows

    def broken(rows):
        yield rows[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, broken(rows))
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slice", "nonsense"], "--slice nonsense is unknown: use one of gpu-tests"),
        (["--out", "/proc/nowhere"], "cannot write /proc/nowhere"),
        (["--out", __file__], "cannot write"),
    ],
)
def test_bad_input_is_one_line(words, message):
    result = CliRunner().invoke(suite.app, words)
    assert result.exit_code == 2
    assert message in result.output and len(result.output.strip().splitlines()) == 1
    assert "/." not in result.output, "the file of the test is named"


def test_list():
    result = CliRunner().invoke(suite.app, ["--list"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == [
        one.name for one in suite.slices()
    ]


def test_exit_status_tells_of_a_failed_slice(tmp_path, monkeypatch):
    for command, status in (("1/0", 1), ("pass", 0)):
        one = suite.Slice("resources", "", ("python", "-c", command))
        monkeypatch.setattr(suite, "slices", lambda one=one: [one])
        result = CliRunner().invoke(suite.app, ["--out", str(tmp_path)])
        assert result.exit_code == status and (tmp_path / "report.html").exists()


def test_the_program_says_where_the_suite_is():
    result = CliRunner().invoke(app, ["bench", "all", "--out", "somewhere"])
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1
    makefile = (suite.ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("make gpu", "python -m benchmarks.suite --out DIR"):
        assert f"`{command}`" in result.output
    assert "gpu:\n\t$(PYTHON) -m benchmarks.suite --out" in makefile


def test_slices_find_the_checkout_from_any_folder(tmp_path):
    code = "from benchmarks import suite; print(suite.ROOT.joinpath('benchmarks').is_dir())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=suite.environment(suite.slices()[0]),
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr
