"""The parity harness finds what it is for; the command, its two rules and the baseline."""

import dataclasses
import functools

import pytest
import torch
from typer.testing import CliRunner

from anima_fast.bench import baseline, errors, parity, parity_report
from anima_fast.bench.run_file import Measurement, read_run, write_run
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
        assert all(c.allowed == 2 * c.reference_error + parity.floor(dtype, 1) for c in checks)
        assert next(c.passed for c in checks if c.tensor == "out") == passes


def test_the_floor_follows_the_longest_sum():
    for dtype in (torch.float32, torch.float64):
        floors = [parity.floor(dtype, n) for n in (1, 256, 1024, 4096)]
        assert floors == [floors[0], floors[0], 2 * floors[0], 4 * floors[0]]
    assert parity.floor(torch.float32, 1) < 5e-7 and parity.floor(torch.float64, 8192) < 1e-13


def test_every_op_is_checked_at_the_models_sizes_and_in_float64():
    for op in OPS.values():
        table = list(errors.cases(op))
        quick = list(errors.cases(op, quick=True))
        assert op.model_shapes and all(case in table for case in quick)
        assert len(table) > 4 * len(quick) / 2
        for sizes in op.model_shapes:
            wide = set() if op.of_half else {torch.float64}
            assert {d for s, d, _ in table if s == sizes} == {*op.dtypes, *wide}
        main = {torch.float16} if op.of_half else {torch.float64, torch.bfloat16}
        assert {d for _, d, _ in quick} == main


def test_rows_of_checks():
    made = functools.partial(
        parity.Check, "gelu", dtype="bfloat16", tensor="out", reference_error=0.1, allowed=0.5
    )
    small, large, odd = (
        made(shape="L=1", layout="plain", error=0.3, elements=1),
        made(shape="L=99", layout="plain", error=0.123456789, elements=999),
        made(shape="L=99", layout="expanded", error=0.49, elements=999),
    )
    own, eager = errors.rows([small, large, odd], "interpreter")
    # The worst is told, chance is no part, what is expanded always looks the worst.
    assert own.value == 0.3 and own.parts == {"L=99 plain": 0.123457, "L=99 expanded": 0.49}
    assert (eager.provider, eager.value, eager.parts, own.note) == ("eager", 0.1, {}, "")
    assert errors.rows([small], "card")[0].parts == {"L=1 plain": 0.3}
    wrong = made(shape="L=99", layout="strided", error=0.6, elements=999)
    assert "L=99 strided out: error 6.00e-01, allowed 5.00e-01" in (
        errors.rows([large, wrong], "interpreter")[0].note
    )


def test_the_command_prints_a_table_and_a_run_file(tmp_path):
    words = ["parity", "--op", "gelu", "--quick"]
    run = CliRunner().invoke(app, [*words, "--baseline", str(tmp_path / "none.jsonl")])
    assert run.exit_code == 2 and "none.jsonl" in run.output
    run = CliRunner().invoke(app, [*words, "--json"])
    (tmp_path / "run.jsonl").write_text(run.stdout)
    found = read_run(tmp_path / "run.jsonl")
    assert {(r.dtype, r.mode) for r in found.rows} == {
        (d, m) for d in ("float64", "bfloat16") for m in ("out", "da")
    }
    assert all(r.source == "interpreter" and not r.note for r in found.rows)
    # The same program on the same machine: the same digits.
    run = CliRunner().invoke(app, [*words, "--baseline", str(tmp_path / "run.jsonl")])
    assert run.exit_code == 0 and "4 measurements compared: 4 same" in run.output
    assert "interpreted" in run.output and "numbers right" in run.output


def test_the_command_ends_with_one_when_a_kernel_is_wrong(monkeypatch):
    wrong = dataclasses.replace(OPS["gelu"], function=lambda a: OPS["gelu"].reference(a) * 1.1)
    monkeypatch.setitem(OPS, "gelu", wrong)
    run = CliRunner().invoke(app, ["parity", "--op", "gelu", "--quick", "--dtype", "float64"])
    assert run.exit_code == 1
    assert "WRONG gelu float64" in run.output and "1 of 4 rows wrong" not in run.output


@pytest.mark.parametrize(
    "words, message",
    [
        (["--op", "fast"], "--op fast is unknown: use one of"),
        (["--dtype", "int8"], "--dtype int8 is unknown: use one of float64"),
        (["--update", "--quick"], "drop --quick"),
    ],
)
def test_bad_words_are_one_line_and_status_two(words, message):
    run = CliRunner().invoke(app, ["parity", *words])
    assert run.exit_code == 2 and message in run.output


def row(op="gelu", value=1e-3, dtype="bfloat16", **fields):
    parts = {"small": value / 2, "large": value}
    return Measurement(op, "error", value, dtype=dtype, mode="out", parts=parts, **fields)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of made-up rows, and a baseline in a folder of its own; returns both and a run."""
    rows = {"gelu": [row()], "attention": [row("attention")], "block": [], "loss": []}
    rows["loss"] = [Measurement("loss", "loss", 0.5, mode="run", parts={"step 01": 0.5})]
    path = tmp_path / "parity-cpu.jsonl"
    made = lambda names, *_: (rows.get(name, []) for name in names)  # noqa: E731
    monkeypatch.setattr(parity_report, "rows_by_op", made)
    monkeypatch.setattr(baseline, "baseline_path", lambda device: path)

    def run(*words):
        done = CliRunner().invoke(app, ["parity", *words])
        return done.exit_code, done.output

    return rows, path, run


def test_a_first_run_is_told_how_to_store_its_numbers(table):
    _, path, run = table
    status, text = run()
    assert status == 0 and "--update` writes it" in text and not path.exists()
    assert run("--update")[0] == 0
    assert {r.op for r in read_run(path).rows} == {"gelu", "attention", "loss"}
    status, text = run()
    assert status == 0 and "3 measurements compared: 3 same" in text


@pytest.mark.parametrize(
    "factor, status, verdict",
    [(1, 0, "1 same"), (1.04, 0, "1 changed"), (1.06, 1, "1 worse"), (0.9, 0, "1 better")],
)
def test_verdicts(table, factor, status, verdict):
    rows, _, run = table
    run("--update")
    rows["gelu"] = [row(value=factor * 1e-3)]
    found, text = run("--op", "gelu")
    assert found == status and verdict in text
    if factor != 1:
        assert f"{verdict[2:]}  gelu out bfloat16 error" in text


def test_one_case_that_became_worse_is_enough(table):
    rows, _, run = table
    run("--update")
    parts = {"small": 5.4e-4, "large": 1e-3}
    rows["gelu"] = [dataclasses.replace(row(), parts=parts)]
    status, text = run()
    assert status == 1 and "[small]  0.0005  0.00054    +8 %" in text


def test_a_loss_may_move_by_a_ten_thousandth(table):
    rows, _, run = table
    run("--update")
    for loss, status in ((0.50004, 0), (0.5001, 1), (0.4999, 1)):
        rows["loss"] = [Measurement("loss", "loss", 0.5, mode="run", parts={"step 01": loss})]
        assert run("--op", "loss")[0] == status


def test_another_environment_widens_the_band_and_says_so(table):
    rows, path, run = table
    rows["gelu"] += [row(dtype="float32")]
    run("--update")
    stored = read_run(path)
    write_run(path, {**stored.environment, "torch": "1.0"}, stored.rows)
    rows["gelu"] = [row(value=1.15e-3, dtype="float32")]
    status, text = run()
    assert status == 0 and "another environment (torch 1.0 -> " in text and "20%" in text
    rows["gelu"] = [row(value=1.25e-3, dtype="float32")]
    assert run()[0] == 1
    # 16 bit in the interpreter is the same everywhere; on a card it is not.
    for source, expected in (("interpreter", 1), ("card", 0)):
        rows["gelu"] = [row(value=1.15e-3, source=source)]
        assert run()[0] == expected
    before = path.read_bytes()
    status, text = run("--update", "--op", "gelu")
    assert status == 2 and "update all of it, without --op" in text
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "dtype, elsewhere, before, after, status",
    [
        ("float64", False, 0.0, 3e-16, 0),
        ("float64", False, 1e-15, 3e-15, 1),
        ("float32", False, 2e-8, 4e-8, 1),
        ("float32", True, 4e-7, 7e-7, 0),
        ("float32", True, 5e-8, 1e-6, 1),
    ],
)
def test_an_error_of_a_few_roundings(table, dtype, elsewhere, before, after, status):
    rows, path, run = table
    rows["gelu"] = [dataclasses.replace(row(dtype=dtype), value=before, parts={"one": before})]
    run("--update")
    if elsewhere:
        stored = read_run(path)
        write_run(path, {**stored.environment, "numpy": "1.0"}, stored.rows)
    rows["gelu"] = [dataclasses.replace(row(dtype=dtype), value=after, parts={"one": after})]
    assert run("--op", "gelu")[0] == status


def test_new_and_missing_rows_are_told(table):
    rows, _, run = table
    run("--update")
    rows["gelu"] = [dataclasses.replace(row(), mode="da")]
    status, text = run("--op", "gelu")
    assert status == 0
    assert "only in the second: gelu da bfloat16 error" in text
    assert "only in the first: gelu out bfloat16 error" in text and "--update" in text


def test_a_part_of_an_op_is_compared_with_its_part(table):
    rows, _, run = table
    rows["gelu"] += [row(dtype="float32")]
    run("--update")
    rows["gelu"] = [dataclasses.replace(row(), value=5e-4, parts={"small": 5e-4})]
    status, text = run("--op", "gelu", "--quick")
    assert status == 0 and "1 measurements compared: 1 same" in text


def test_an_update_replaces_the_rows_of_its_ops_alone(table):
    rows, path, run = table
    run("--update")
    for name in ("gelu", "attention"):
        rows[name] = [row(name, value=3e-3)]
    assert run("--update", "--op", "gelu")[0] == 0
    values = {r.op: r.value for r in read_run(path).rows}
    assert values == {"gelu": 3e-3, "attention": 1e-3, "loss": 0.5}
    # In the order of the registry: a diff shows what changed and nothing else.
    assert [r.op for r in read_run(path).rows] == ["attention", "gelu", "loss"]


def test_a_wrong_value_is_never_stored(table):
    rows, path, run = table
    rows["gelu"] = [row(note="gelu bfloat16 small plain out: error 1, allowed 0.1")]
    status, text = run("--update")
    assert status == 2 and "no baseline" in text and not path.exists()


def test_outside_of_a_checkout_the_rule_alone_is_left(table, monkeypatch):
    _, path, run = table
    monkeypatch.setattr(baseline, "baseline_path", lambda device: None)
    status, text = run()
    assert status == 0 and "baseline" not in text
    status, text = run("--update")
    assert status == 2 and "--baseline FILE" in text
    assert run("--update", "--baseline", str(path))[0] == 0 and path.exists()


def test_the_stored_baseline_has_every_row():
    """Of this checkout: each op in every dtype of the table, the block and both curves."""
    stored = read_run(baseline.baseline_path("cpu"))
    own = [r for r in stored.rows if r.provider == "own"]
    for name, op in OPS.items():
        dtypes = {str(dtype).removeprefix("torch.") for _, dtype, _ in errors.cases(op)}
        assert {r.dtype for r in own if r.op == name} == dtypes
    assert {r.mode for r in own if r.op == "loss"} == {"fused", "run"}
    assert len({r.mode for r in own if r.op == "block"}) > 30
    assert not any(r.note for r in own)
