"""What `anima-fast watch` makes of the files beside the log, and of the state of a run."""

import json
import os
import sys
import time
from types import ModuleType

import pytest
from PIL import Image
from watch_run import PROMPTS, FakeRun

from anima_fast.reports import reading
from anima_fast.reports.watch.pictures import name_facts
from anima_fast.reports.watch.run import WatchedRun, describe_state


def append(path, text):
    with open(path, "ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def test_files_that_come_late_break_and_go(tmp_path):
    out = tmp_path / "later"
    run = WatchedRun(out)
    answer = run.answer({})
    assert answer["state"]["name"] == "waiting" and not answer["folder_exists"]
    fake = FakeRun(out)
    answer = run.answer(answer["tokens"])
    assert answer["state"]["name"] == "waiting" and answer["folder_exists"]
    fake.run_file()
    fake.dataset()
    answer = run.answer(answer["tokens"])
    assert answer["run"]["output_name"] == "mika_style_v3" and answer["dataset"]["images"] == 48
    # Half written: what was there before stays.
    for name in ("run.json", "dataset.json"):
        (out / name).write_text('{"output_name": "o')
    answer = run.answer(answer["tokens"])
    assert answer["run"]["output_name"] == "mika_style_v3" and "dataset" not in answer
    (out / "run.json").write_text('{"output_name": "other", "steps": NaN, "images": 1e999}')
    (out / "dataset.json").unlink()
    answer = run.answer(answer["tokens"])
    assert answer["run"] == {"output_name": "other", "steps": None, "images": None}
    assert answer["dataset"] is None
    for broken in ("[1]", '{"a": ' + "[" * 700 + "]" * 700 + "}"):
        (out / "run.json").write_text(broken)
        assert run.answer({})["run"]["output_name"] == "other"
    (out / "run.json").write_text('{"state": ["odd"], "output_name": "other"}')
    assert run.answer({})["state"]["name"] == "preparing"
    for path in out.iterdir():
        path.unlink()
    out.rmdir()
    answer = run.answer(answer["tokens"])
    assert answer["state"]["name"] == "waiting" and answer["run"] == {}


def test_the_console_log_is_followed_from_near_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("anima_fast.reports.watch.log.CONSOLE_BYTES", 300)
    path = tmp_path / "console.log"
    path.write_text("".join(f"2026-01-02 03:04:05 line {n}\n" for n in range(100)))
    run = WatchedRun(tmp_path)
    answer = run.answer({})
    assert (
        answer["console"]["lines"][-1].endswith("line 99") and len(answer["console"]["lines"]) < 12
    )
    append(path, "2026-01-02 03:04:06 Ü\n2026-01-02 ")
    answer = run.answer(answer["tokens"])
    assert answer["console"]["lines"] == ["2026-01-02 03:04:06 Ü"]
    path.write_text("2026-01-02 04:00:00 anew\n")
    answer = run.answer(answer["tokens"])
    assert answer["console"] == {"first": 0, "lines": ["2026-01-02 04:00:00 anew"]}


def test_previews_tell_when_and_what(tmp_path):
    fake = FakeRun(tmp_path, steps=100, per_epoch=10)
    fake.run_file()
    fake.advance(20)
    fake.preview()
    fake.preview("000020")
    (tmp_path / "sample" / "mine.jpg").write_bytes(b"half a pict")
    run = WatchedRun(tmp_path)
    answer = run.answer({})
    assert answer["pictures"]["total"] == 7 and len(answer["pictures"]["pictures"]) == 6
    shown = {(one["label"], one["index"]): one for one in answer["pictures"]["pictures"]}
    one = shown["e000002", 1]
    assert (one["step"], one["epoch"], one["seed"]) == (20, 2, 42)
    assert (one["width"], one["height"], one["prompt"]) == (64, 96, PROMPTS[1])
    assert one["earlier"] is False
    # The picture is written to its end later.
    Image.new("RGB", (9, 7)).save(tmp_path / "sample" / "mine.jpg")
    answer = run.answer(answer["tokens"])
    mine = next(one for one in answer["pictures"]["pictures"] if one["name"] == "mine.jpg")
    assert (mine["width"], mine["height"], mine["prompt"]) == (9, 7, None)
    # Without the log's word the name and the ends of the epochs tell.
    log = tmp_path / "log.jsonl"
    lines = [text for text in log.read_text().splitlines() if '"preview"' not in text]
    log.write_text("\n".join(lines) + "\n")
    answer = run.answer(answer["tokens"])
    shown = {(o.get("label"), o.get("index")): o for o in answer["pictures"]["pictures"]}
    assert shown["e000002", 0]["step"] == 20 and shown["000020", 0]["step"] == 20


def test_previews_of_an_earlier_run_are_told_apart(tmp_path):
    fake = FakeRun(tmp_path)
    fake.preview()
    old = time.time() - 3600
    for path in (tmp_path / "sample").iterdir():
        os.utime(path, (old, old))
    fake.run_file(started_at=time.time())
    run = WatchedRun(tmp_path)
    assert all(one["earlier"] for one in run.answer({})["pictures"]["pictures"])
    fake.run_file(first_step=40)
    assert not any(one["earlier"] for one in run.answer({})["pictures"]["pictures"])


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("e000004_00_20260102030405.png",
         {"label": "e000004", "index": 0, "seed": None, "epoch": 4}),
        ("a_1_000500_11_20260102030405_42.png",
         {"label": "000500", "index": 11, "seed": 42, "step": 500}),
        ("run_000001_02_x_001234567_123_20260102030405_-3.webp",
         {"label": "001234567", "index": 123, "seed": -3, "step": 1234567}),
        ("holiday.png", {}),
        ("000500_0_2026.png", {}),
    ],
)  # fmt: skip
def test_names_of_previews(name, facts):
    assert name_facts(name) == facts


@pytest.mark.parametrize(
    ("run", "facts", "name"),
    [
        ({}, {}, "waiting"),
        ({}, {"says": "reading", "quiet_s": 3}, "preparing"),
        ({}, {"step": 5, "quiet_s": 3}, "running"),
        ({}, {"step": 5, "quiet_s": 3000}, "ended"),
        ({"state": "running"}, {"quiet_s": 400}, "preparing"),
        ({"state": "running"}, {"quiet_s": 1000}, "stalled"),
        ({"state": "running"}, {"step": 5, "quiet_s": 200, "step_s": 1}, "running"),
        ({"state": "running"}, {"step": 5, "quiet_s": 301, "step_s": 1}, "stalled"),
        ({"state": "running"}, {"step": 5, "quiet_s": 301, "step_s": 60}, "running"),
        ({"state": "finished"}, {"step": 5, "quiet_s": 1e9}, "finished"),
        ({"state": "interrupted"}, {"step": 5, "quiet_s": 1e9}, "interrupted"),
        ({"state": "failed", "error": "x"}, {"quiet_s": 1e9}, "failed"),
        ({"state": "finished"}, {"step": 5, "quiet_s": 3, "goes_on": True}, "preparing"),
        ({"state": "finished"}, {"step": 5, "goes_on": True, "says": "error: x"}, "failed"),
        ({}, {"says": "error: no such file", "quiet_s": 9999}, "failed"),
        ({}, {"says": "interrupted"}, "interrupted"),
        ({"state": 7}, {"step": 5, "quiet_s": 3}, "running"),
    ],
)
def test_states(run, facts, name):
    facts = {"step": None, "step_s": None, "quiet_s": None, **facts}
    found = describe_state(run, **facts)
    assert found["name"] == name and found["text"]


def test_a_run_that_fails_before_its_first_step(tmp_path):
    """There is no run.json, or that of the run before: the console tells."""
    fake = FakeRun(tmp_path)
    fake.say("reading the dataset")
    fake.say("error: cannot read image a.png")
    state = WatchedRun(tmp_path).answer({})["state"]
    assert state["name"] == "failed" and state["text"].endswith(" error: cannot read image a.png")
    fake.say("reading the dataset")
    assert WatchedRun(tmp_path).answer({})["state"]["name"] == "preparing"


def test_silence_is_told_in_minutes(tmp_path):
    fake = FakeRun(tmp_path, steps=100)
    fake.run_file()
    fake.advance(3)
    now = time.time()
    assert WatchedRun(tmp_path, lambda: now + 100).answer({})["state"]["name"] == "running"
    state = WatchedRun(tmp_path, lambda: now + 760).answer({})["state"]
    assert state["name"] == "stalled" and "12 min" in state["text"]


def console_line(seconds, text="reading data"):
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))} {text}\n"


def test_the_next_run_in_the_folder_is_seen_before_its_first_step(tmp_path):
    """It begins a console log at once, run.json and the log only when models are read."""
    now = time.time()
    fake = FakeRun(tmp_path, steps=100)
    fake.advance(20)
    (tmp_path / "console.log").write_text(console_line(now - 4000))
    fake.run_file(started_at=now - 3990, state="finished")
    fake.run_file(updated_at=now - 3000)
    for name in ("log.jsonl", "run.json", "console.log"):
        os.utime(tmp_path / name, (now - 3000, now - 3000))
    run = WatchedRun(tmp_path)
    answer = run.answer({})
    assert answer["state"]["name"] == "finished" and answer["last"]["step"] == 20
    (tmp_path / "console.log").write_text(console_line(now - 20))
    answer = run.answer(answer["tokens"])
    assert answer["state"]["name"] == "preparing" and answer["run"] == {}
    assert (answer["log"]["first"], answer["log"]["steps"], answer["last"]) == (0, [], {})
    # Then it moves the old log aside, writes run.json and makes steps.
    (tmp_path / "log.jsonl").unlink()
    fake.step = 0
    fake.run_file(state="running", started_at=now)
    fake.advance(2)
    answer = run.answer(answer["tokens"])
    assert answer["state"]["name"] == "running" and answer["log"]["steps"] == [1, 2]


@pytest.mark.parametrize("hours", [-9, 0, 5])
@pytest.mark.parametrize("age", [0, 3000, None], ids=["now", "kept", "copied"])
def test_neither_another_time_zone_nor_a_copy_makes_a_run_new(tmp_path, hours, age):
    """The console's times are those of a container or a server; a copy's files are all new."""
    now = time.time()
    fake = FakeRun(tmp_path, steps=20)
    fake.advance(20)
    began = now - 600 - (age or 0) + 3600 * hours
    lines = [console_line(began + 60 * i) for i in range(11)]
    (tmp_path / "console.log").write_text("".join(lines))
    ended = now - (3000 if age is None else age)
    fake.facts |= {"started_at": ended - 600, "updated_at": ended, "state": "finished"}
    (tmp_path / "run.json").write_text(json.dumps(fake.facts))
    for name in ("log.jsonl", "run.json", "console.log"):
        os.utime(tmp_path / name, (now - (age or 0), now - (age or 0)))
    answer = WatchedRun(tmp_path).answer({})
    assert answer["state"]["name"] == "finished" and answer["last"]["step"] == 20
    assert answer["updated_at"] == pytest.approx(ended) and answer["run"]["steps"] == 20


def test_a_resumed_run_keeps_its_curves_while_it_prepares(tmp_path):
    now = time.time()
    fake = FakeRun(tmp_path, steps=100)
    fake.advance(20)
    (tmp_path / "console.log").write_text(console_line(now - 4000))
    fake.run_file(started_at=now - 3990, state="interrupted", updated_at=now - 3000)
    fake.facts["updated_at"] = now - 3000
    (tmp_path / "run.json").write_text(json.dumps(fake.facts))
    for name in ("log.jsonl", "run.json"):
        os.utime(tmp_path / name, (now - 3000, now - 3000))
    os.utime(tmp_path / "console.log", (now - 3000, now - 3000))
    run = WatchedRun(tmp_path)
    assert run.answer({})["state"]["name"] == "interrupted"
    append(tmp_path / "console.log", console_line(now, "resuming"))
    answer = run.answer({})
    assert answer["state"]["name"] == "preparing" and answer["last"]["step"] == 20


def test_events_validation_and_sigma_bins(tmp_path):
    FakeRun(tmp_path, steps=100, per_epoch=10).whole(45)
    marks = WatchedRun(tmp_path).answer({})["marks"]
    assert marks["validation"]["steps"] == [10, 20, 30, 40]
    assert marks["validation"]["columns"]["sigma/0.2"]["mean"][0] is not None
    assert [record["epoch"] for record in marks["sigma_bins"]] == [1, 4]
    assert len(marks["sigma_bins"][0]["means"]) == 10
    assert [event["step"] for event in marks["events"]] == [37]


def test_windows_is_asked_to_share_the_file_for_deletion(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    calls = []
    api, runtime = ModuleType("_winapi"), ModuleType("msvcrt")
    api.GENERIC_READ, api.OPEN_EXISTING, api.NULL = 0x80000000, 3, 0
    api.CreateFile = lambda *words: calls.append(words) or 77
    runtime.open_osfhandle = lambda handle, flags: (handle == 77 and os.open(path, flags)) or -1
    monkeypatch.setitem(sys.modules, "_winapi", api)
    monkeypatch.setitem(sys.modules, "msvcrt", runtime)
    monkeypatch.setattr(reading.os, "name", "nt")
    with reading.open_shared(str(path)) as file:
        monkeypatch.undo()
        assert file.read() == b'{"a": 1}'
    ((name, access, share, *_),) = calls
    assert (name, access, share) == (str(path), 0x80000000, 7)
