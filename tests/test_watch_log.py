"""What `anima-fast watch` reads from a log that grows, breaks, is replaced or is huge."""

import json
import os
import random

import pytest
from watch_run import FakeRun

from anima_fast.reports.reading import Tail
from anima_fast.reports.watch import log as log_module
from anima_fast.reports.watch.curves import CurveTable
from anima_fast.reports.watch.log import LogView
from anima_fast.reports.watch.run import WatchedRun


def step(number, loss=0.1, **more):
    return {"kind": "step", "step": number, "epoch": 1, "loss": loss, **more}


def write_log(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def append(path, text):
    with open(path, "ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def losses(answer):
    return answer["log"]["columns"].get("loss", {}).get("mean", [])


def test_a_log_is_read_as_it_grows_each_byte_once(tmp_path):
    path = tmp_path / "log.jsonl"
    view = LogView(path)
    view.refresh()
    assert len(view.steps) == 0
    write_log(path, *(step(n, loss=n / 10) for n in range(1, 4)))
    view.refresh()
    assert view.steps.answer()["columns"]["loss"]["mean"] == [0.1, 0.2, 0.3]
    size, before = path.stat().st_size, view.tail.bytes_read
    assert before == size
    line = json.dumps(step(4, loss=0.4))
    append(path, line[:20])
    view.refresh()
    assert len(view.steps) == 3, "half a line is no record"
    append(path, line[20:] + "\r\n")
    view.refresh()
    assert view.steps.answer(3)["columns"]["loss"]["mean"] == [0.4]
    # Beside what is new, only the bytes that are compared.
    assert view.tail.bytes_read - before <= 2 * 256 + 20 + len(line) + 2


@pytest.mark.parametrize(
    "line",
    [
        "", "no json", "[]", "null", "17", '"step"', '{"kind": "step"}', "[" * 5000,
        '{"kind": "step", "step": "3"}', '{"kind": "step", "step": NaN}',
        '{"kind": "step", "step": true}', '{"kind": "other", "step": 9}',
        '{"kind": "step", "step": 9', '{"kind": ["step"], "step": 9}', b"\xff\xfe\x00",
        '{"kind": "epoch", "step": 9}', '{"kind": "preview", "step": 9, "files": 7}',
        '{"kind": "preview", "step": 9, "files": [1, null]}', '{"kind": "validation", "step": 9}',
        '{"kind": "step", "step": 1, "loss": 5.0}',
        '{"kind": "sigma_bins", "step": 9, "means": "x"}',
        '{"kind": "step", "step": 1' + "0" * 400 + "}",
        '{"kind": "sigma_bins", "step": 9, "means": ' + "[" * 700 + "]" * 700 + "}",
    ],
)  # fmt: skip
def test_a_line_that_makes_no_sense_is_left_out(tmp_path, line):
    write_log(tmp_path / "log.jsonl", step(1), step(2))
    append(tmp_path / "log.jsonl", line.encode() + b"\n" if isinstance(line, str) else line + b"\n")
    append(tmp_path / "log.jsonl", json.dumps(step(3)) + "\n")
    answer = WatchedRun(tmp_path).answer({})
    assert answer["log"]["steps"] == [1, 2, 3]
    json.dumps(answer, allow_nan=False)


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    text = (
        '{"kind": "step", "step": %d, "loss": %s, "lr": {"a": %s, "b": "x"}, "grad_norm": 1e999}\n'
    )
    values = ["0.5", "NaN", "Infinity", "-Infinity", "null", "1e400", "true", '"0.1"', "[1]"]
    log = "".join(text % (i, v, v) for i, v in enumerate(values, 1))
    (tmp_path / "log.jsonl").write_text(log)
    answer = WatchedRun(tmp_path).answer({})
    assert losses(answer) == [0.5] + [None] * 8
    assert answer["log"]["columns"]["lr/a"]["mean"] == [0.5] + [None] * 8
    assert answer["not_finite"] == 8
    json.dumps(answer, allow_nan=False)


def replace_log(path, *records):
    """As the trainer does it: another file takes the place."""
    write_log(path.with_name("new"), *records)
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("length", [1, 5, 50])
@pytest.mark.parametrize("how", [write_log, replace_log])
def test_a_fresh_log_starts_over_also_when_it_is_longer(tmp_path, how, length):
    path = tmp_path / "log.jsonl"
    write_log(path, *(step(n, loss=0.5) for n in range(1, 6)))
    run = WatchedRun(tmp_path)
    tokens = run.answer({})["tokens"]
    how(path, *(step(n, loss=0.25) for n in range(1, length + 1)))
    answer = run.answer(tokens)
    assert answer["log"]["first"] == 0 and losses(answer) == [0.25] * length
    assert "marks" in answer


def test_a_log_that_vanishes_and_comes_again_starts_over(tmp_path):
    path = tmp_path / "log.jsonl"
    write_log(path, step(1), step(2))
    run = WatchedRun(tmp_path)
    tokens = run.answer({})["tokens"]
    path.unlink()
    answer = run.answer(tokens)
    assert (answer["log"]["first"], answer["log"]["steps"], answer["last"]) == (0, [], {})
    write_log(path, step(1))
    assert run.answer(answer["tokens"])["log"]["steps"] == [1]


def test_a_resumed_log_that_was_cut_back_starts_over(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [step(n, loss=n / 100) for n in range(1, 21)]
    write_log(path, *records)
    run = WatchedRun(tmp_path)
    tokens = run.answer({})["tokens"]
    write_log(path, *records[:10], *(step(n, loss=1.0) for n in range(11, 31)))
    answer = run.answer(tokens)
    assert answer["log"]["steps"] == list(range(1, 31))
    assert losses(answer)[9:12] == [0.1, 1.0, 1.0]


def test_answers_bring_only_what_is_new(tmp_path):
    fake = FakeRun(tmp_path, steps=100, per_epoch=10).whole(25)
    run = WatchedRun(tmp_path)
    first = run.answer({})
    assert first["log"]["steps"] == list(range(1, 26))
    assert {"marks", "pictures", "dataset"} <= set(first)
    assert len(first["console"]["lines"]) == 6
    same = run.answer(first["tokens"])
    # The last row may have grown, so it comes again.
    assert (same["log"]["first"], same["log"]["steps"]) == (24, [25])
    assert same["console"] == {"first": 6, "lines": []}
    assert not {"marks", "pictures", "dataset"} & set(same)
    fake.advance(5)
    fake.preview()
    third = run.answer(same["tokens"])
    assert third["log"]["steps"] == [25, 26, 27, 28, 29, 30]
    assert [line[20:27] for line in third["console"]["lines"]] == ["epoch 3"]
    assert third["marks"]["epochs"][-1] == [30, 3] and "pictures" in third
    assert "dataset" not in third
    # Another server, or tokens that make no sense: everything.
    for tokens in (
        {**third["tokens"], "session": "other"},
        {"row": "-5"},
        {"log": "x", "line": "²"},
    ):
        answer = WatchedRun(tmp_path).answer(tokens)
        assert answer["log"]["first"] == 0 and "dataset" in answer


@pytest.mark.parametrize("size", [6, 7, 100, 1001])
def test_thinning_keeps_means_and_spikes(size):
    rng = random.Random(size)
    values = [rng.uniform(0, 1) for _ in range(size)]
    table = CurveTable(most_rows=8)
    for i, value in enumerate(values, 1):
        assert table.add(i, {"loss": value, "late": value if i > size - 3 else None}, 1)
    answer = table.answer()
    column, stride = answer["columns"]["loss"], answer["stride"]
    assert answer["steps"] == [min(at + stride, size) for at in range(0, size, stride)]
    assert len(answer["steps"]) <= 8
    for row, at in enumerate(range(0, size, stride)):
        own = values[at : at + stride]
        assert column["mean"][row] == pytest.approx(sum(own) / len(own), rel=1e-5)
        if stride > 1:
            assert column["low"][row] == pytest.approx(min(own), rel=1e-5)
            assert column["high"][row] == pytest.approx(max(own), rel=1e-5)
    late = answer["columns"]["late"]["mean"]
    assert len(late) == len(answer["steps"]) and late[-1] is not None and late[0] is None
    assert not table.add(size, {"loss": 9.0}, 1), "a step that was already there"


def test_a_million_lines_are_read_in_pieces_and_sent_in_few(tmp_path, monkeypatch):
    """Counted in bytes and rows: the work of a poll does not grow with the log."""
    monkeypatch.setattr(log_module, "BYTES_AT_ONCE", 1 << 20)
    lines = 30_000
    path, line = tmp_path / "log.jsonl", '{"kind":"step","step":%d,"loss":0.1,"epoch":1}\n'
    path.write_text("".join(line % n for n in range(1, lines + 1)))
    run, answer, polls = WatchedRun(tmp_path), {"tokens": {}}, 0
    while polls == 0 or answer["behind"]:
        before = run.log.tail.bytes_read
        answer = run.answer(answer["tokens"])
        assert run.log.tail.bytes_read - before <= (1 << 20) + 256
        polls += 1
    answer = run.answer(answer["tokens"])
    assert polls > 1 and run.log.tail.bytes_read <= path.stat().st_size + 256 * (polls + 1)
    assert answer["last"]["step"] == lines and len(run.log.steps) <= 2000
    assert len(json.dumps(run.answer({})["log"])) < 150_000
    before = run.log.tail.bytes_read
    append(path, line % (lines + 1))
    answer = run.answer(answer["tokens"])
    assert answer["last"]["step"] == lines + 1 and len(answer["log"]["steps"]) <= 2
    assert run.log.tail.bytes_read - before <= 256 + 100


def test_lines_without_end_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("anima_fast.reports.reading.MOST_LINE_BYTES", 1000)
    path = tmp_path / "a"
    tail = Tail(path)
    append(path, "first\n" + "x" * 5000)
    found = []
    for _ in range(20):
        found += tail.read(600)
    append(path, "end\nlast\n")
    for _ in range(5):
        found += tail.read(600)
    assert found == [b"first", b"last"]
