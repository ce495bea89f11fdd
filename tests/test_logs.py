"""The log file, the trackers, the progress display and the treatment of non-finite numbers."""

import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from anima_fast.console import configure_console
from anima_fast.errors import UserError
from anima_fast.options.run import TrainOptions
from anima_fast.progress import ItemProgress, Progress, clock, describe
from anima_fast.training.bad_batches import BadBatchTracker, find_fault
from anima_fast.training.logs import RunLog


def record(step, **others):
    return {"step": step, "epoch": 1, "loss": 0.5, "loss_avg": 0.25, "lr": {"unet": 1e-4}, **others}


def options(tmp_path, **others):
    return TrainOptions(output_dir=str(tmp_path), **others)


def run_log(chosen, **others):
    return RunLog(Path(chosen.output_dir), chosen, **others)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]


def test_each_line_is_an_object_and_is_there_at_once(tmp_path):
    with run_log(options(tmp_path)) as log:
        log.step(record(1, grad_norm=0.1))
        assert lines(tmp_path) == [{"kind": "step", **record(1, grad_norm=0.1)}]
        log.epoch(1, 1, 0.25)
        log.validation(1, 1, 0.75, 0.25)
    assert lines(tmp_path)[1:] == [
        {"kind": "epoch", "step": 1, "epoch": 1, "loss_avg": 0.25},
        {"kind": "validation", "step": 1, "epoch": 1, "loss": 0.75, "divergence": 0.5},
    ]
    assert log.path == tmp_path / "log.jsonl"


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with run_log(options(tmp_path)) as log:
        log.step(record(1, loss=float("nan"), lr={"unet": float("inf")}, more=[float("-inf")]))
    (line,) = lines(tmp_path)
    assert (line["loss"], line["lr"], line["more"]) == (None, {"unet": None}, [None])


def test_a_resumed_log_holds_no_step_twice(tmp_path):
    with run_log(options(tmp_path)) as log:
        for step in range(1, 6):
            log.step(record(step, run="first"))
        log.epoch(3, 1, 0.2)
        log.event(3, "one")
        log.event(3, "two")
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')
    with run_log(options(tmp_path), first_step=3) as log:
        log.epoch(3, 1, 0.2)
        for step in range(4, 7):
            log.step(record(step, run="second"))
    seen = [(line["kind"], line["step"], line.get("run")) for line in lines(tmp_path)]
    assert seen == [
        ("step", 1, "first"),
        ("step", 2, "first"),
        ("step", 3, "first"),
        ("epoch", 3, None),
        ("event", 3, None),
        ("event", 3, None),
        ("step", 4, "second"),
        ("step", 5, "second"),
        ("step", 6, "second"),
    ]


def test_a_fresh_run_moves_the_older_log_aside(tmp_path):
    for name in ("old", "new"):
        with run_log(options(tmp_path)) as log:
            log.step(record(1, run=name))
    assert [line["run"] for line in lines(tmp_path)] == ["new"]
    assert '"old"' in (tmp_path / "log.previous.jsonl").read_text("utf-8")


def test_tensorboard_gets_the_scalar_names_of_sd_scripts(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = options(
        tmp_path, logging_dir=str(tmp_path / "tb"), log_prefix="mine-", log_config=True
    )
    norms = {"keys_scaled": 1, "average_key_norm": 0.5, "max_key_norm": 0.75}
    with run_log(chosen) as log:
        log.step(record(1, d_lr={"unet": 0.1}, max_norm=norms))
        log.step(record(2, loss=0.125, loss_avg=None))
        log.epoch(2, 1, 0.25)
        log.validation(2, 1, 0.75, 0.25)
    (folder,) = (tmp_path / "tb").glob("mine-*/network_train")
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/current", "loss/average", "lr/unet", "lr/d*lr/unet", "max_norm/keys_scaled",
        "max_norm/average_key_norm", "max_norm/max_key_norm", "loss/epoch_average",
        "loss/validation/epoch_average", "loss/validation/epoch_divergence",
    }  # fmt: skip
    assert [(e.step, e.value) for e in events.Scalars("loss/current")] == [(1, 0.5), (2, 0.125)]
    assert [e.step for e in events.Scalars("loss/average")] == [1]
    assert events.Tags()["tensors"] == ["options/text_summary"]


class FakeWandb(types.ModuleType):
    """Records what is done to wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def login(self, key):
        self.calls.append(("login", key))

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        return types.SimpleNamespace(
            log=lambda values, step: self.calls.append(("log", step, values)),
            finish=lambda: self.calls.append(("finish",)),
        )


def test_wandb_gets_options_scalars_and_no_secrets(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tmp_path / "trackers.toml"
    config.write_text('[wandb]\ngroup = "tests"\n', encoding="utf-8")
    chosen = options(
        tmp_path,
        log_with="wandb",
        logging_dir=str(tmp_path / "logs"),
        wandb_run_name="run 1",
        log_tracker_name="project",
        wandb_api_key="secret-key",
        log_config=True,
        log_tracker_config=str(config),
        validate_every_n_steps=1,
    )
    with run_log(chosen) as log:
        log.step(record(1))
        log.validation(1, 1, 0.75, 0.25, per="step")
    login, init, step, validation, finish = fake.calls
    assert login == ("login", "secret-key")
    arguments = init[1]
    assert (arguments["project"], arguments["name"]) == ("project", "run 1")
    assert arguments["group"] == "tests"
    assert arguments["config"]["learning_rate"] == 1e-4
    assert "secret-key" not in json.dumps(arguments, default=str)
    assert step == ("log", 1, {"loss/current": 0.5, "loss/average": 0.25, "lr/unet": 1e-4})
    assert validation[2]["loss/validation/step_divergence"] == 0.5
    assert finish == ("finish",)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_tracker_names_the_extra(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    chosen = options(tmp_path, log_with=name, logging_dir=str(tmp_path / "logs"))
    with pytest.raises(UserError, match=rf"anima-fast\[{name}\]"):
        run_log(chosen)


def test_a_bad_tracker_config_is_explained(tmp_path):
    (tmp_path / "bad.toml").write_text("[wandb", encoding="utf-8")
    for name in ("bad.toml", "missing.toml"):
        chosen = options(
            tmp_path, logging_dir=str(tmp_path / "logs"), log_tracker_config=str(tmp_path / name)
        )
        with pytest.raises(UserError, match="give tables named tensorboard or wandb"):
            run_log(chosen)


def test_a_log_folder_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        run_log(options(tmp_path / "file"))


# Progress


def plain(total=100, first=0, **others):
    stream = io.StringIO()
    progress = Progress(console=Console(file=stream, **others))
    progress.start(first, total)
    return progress, stream


def test_without_a_terminal_a_tenth_of_the_steps_is_a_line():
    progress, stream = plain(total=100)
    progress.say("hello [not markup]")
    for step in range(1, 101):
        progress.step(record(step, step_s=2.0, images_per_s=1.5, memory_mib=2048))
    text = stream.getvalue().splitlines()
    assert text[0] == "hello [not markup]"
    assert [line.split(" |")[0] for line in text[1:3]] == ["step 1/100", "step 10/100"]
    assert len(text) == 12
    assert text[2] == (
        "step 10/100 | epoch 1 | loss 0.2500 | 3:00 left | lr 0.0001 | 2.00 s/step | 1.50 images/s"
        " | 2.0 GiB"
    )


def test_a_terminal_gets_a_live_display():
    progress, stream = plain(total=10, force_terminal=True, width=160)
    with progress:
        for step in range(1, 11):
            progress.step(record(step, step_s=1.0))
        progress.say("saved")
    text = stream.getvalue()
    assert "10/10" in text and "loss 0.2500" in text and "saved" in text and "\x1b[" in text


def test_a_narrow_terminal_keeps_the_step_and_the_time_left():
    progress, stream = plain(total=20000, first=1000, force_terminal=True, width=80)
    with progress:
        progress.step(record(1234, step_s=1.0, images_per_s=1.5, memory_mib=11300))
    text = stream.getvalue()
    assert "1234/20000" in text and "5:12:46 left" in text


def test_simple_console_means_plain_lines():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True)
    progress = Progress(simple=True, console=console)
    progress.start(0, 2)
    progress.step(record(1))
    assert stream.getvalue().startswith("step 1/2 | epoch 1")
    assert "\x1b[" not in stream.getvalue()


class BrokenStream(io.StringIO):
    """A closed pipe."""

    def write(self, text):
        raise BrokenPipeError("closed")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_broken_console_never_stops_the_run(terminal):
    with Progress(console=Console(file=BrokenStream(), force_terminal=terminal)) as progress:
        progress.say("hello")
        progress.start(0, 3)
        for step in range(1, 4):
            progress.step(record(step))
        progress.say("bye")


def test_messages_to_a_closed_pipe_never_stop_the_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", BrokenStream())
    for simple in (False, True):
        configure_console(simple=simple).warning("hello")
        with ItemProgress("encoding", 1, "images", lambda text: None) as items:
            items.advance(1)


def test_bars_end_where_the_terminal_does(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with ItemProgress("encoding", 1, "images", lambda text: None) as items:
        monkeypatch.setattr(sys, "stderr", BrokenStream())
        monkeypatch.setattr(items._bars._display.console, "file", BrokenStream())
        items.advance(1)


def test_old_code_pages_replace_what_they_cannot_show():
    raw = io.BytesIO()
    progress = Progress(console=Console(file=io.TextIOWrapper(raw, encoding="cp1252")))
    progress.say("画像.png saved")
    assert raw.getvalue().decode("cp1252").strip() == "??.png saved"


def test_facts_leave_out_what_is_unknown():
    assert describe({"step": 1}, None, 10) == ""
    line = describe({"step": 1, "loss": 2.0, "lr": {"a": 1e-4, "b": 2e-5}}, 1.0, 3)
    assert line == "loss 2.0000 | 0:02 left | lr 0.0001/2e-05 | 1.00 s/step"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (7322, "2:02:02")])
def test_clock(seconds, text):
    assert clock(seconds) == text


# Health


def batch(*names, latents=None, context=None):
    """A batch of finite numbers, except the given ones."""
    count = len(names)
    return types.SimpleNamespace(
        latents=torch.zeros(count, 16, 2, 2) if latents is None else latents,
        text=types.SimpleNamespace(
            context=torch.zeros(count, 3, 4) if context is None else context
        ),
        items=[types.SimpleNamespace(path=name) for name in names],
    )


def fault_in(tensor, row):
    tensor[row].view(-1)[0] = float("nan")
    return tensor


def test_the_first_stage_that_is_not_finite_is_named_with_its_image():
    losses = torch.tensor([0.1, float("nan")])
    good = (batch("x.png"), torch.tensor([0.1]))
    latents = fault_in(torch.zeros(2, 16, 2, 2), 1)
    context = fault_in(torch.zeros(2, 3, 4), 0)
    pair = ("a.png", "b.png")
    assert find_fault([good, (batch(*pair, latents=latents), losses)]) == ("latents", ["b.png"])
    assert find_fault([good, (batch(*pair, context=context), losses)]) == (
        "text context",
        ["a.png"],
    )
    assert find_fault([good, (batch(*pair), losses)]) == ("loss", ["b.png"])
    everything = ("gradient", ["x.png", "a.png", "b.png"])
    assert find_fault([good, (batch(*pair), torch.zeros(2))]) == everything


def bad_step(tracker, name="a.png", said=None):
    losses = torch.tensor([float("nan")])
    said = [] if said is None else said
    return tracker.accepts([(batch(name), losses)], float("nan"), float("nan"), say=said.append)


def good_step(tracker):
    return tracker.accepts([(batch("good.png"), torch.zeros(1))], 0.5, 1.0, say=print)


def tracker_of(limit, precision="bf16"):
    return BadBatchTracker(limit, precision=precision, learning_rate=1e-4)


def test_bad_batches_are_skipped_by_name_until_there_are_too_many():
    tracker = tracker_of(3, precision="fp16")
    said = []
    for index in range(3):
        assert good_step(tracker)
        assert not bad_step(tracker, f"{index}.png", said)
    assert said[1] == "skipped a batch: the loss is not finite (1.png)"
    with pytest.raises(UserError) as caught:
        bad_step(tracker, "3.png")
    message = str(caught.value)
    for part in ("4 of the last 7", "in the loss", "0.png", "3.png", "bf16", "0.0001", "PyTorch"):
        assert part in message
    assert "\n" not in message


def test_rare_bad_batches_never_stop_a_run():
    tracker = tracker_of(2)
    for step in range(400):
        assert bad_step(tracker) is False if step % 25 == 0 else good_step(tracker)


def test_no_bad_batch_allowed_stops_at_the_first():
    with pytest.raises(UserError, match="latents"):
        tracker = tracker_of(0)
        bad = batch("a.png", latents=torch.full((1, 16, 2, 2), float("inf")))
        group = [(bad, torch.tensor([float("nan")]))]
        tracker.accepts(group, float("nan"), 1.0, say=print)


def test_loss_scale_overflow_is_no_bad_batch_until_the_scale_is_gone():
    tracker = tracker_of(0, precision="fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    group, said = [(batch("a.png"), torch.zeros(1))], []
    for _ in range(5):
        assert tracker.accepts(group, 0.5, float("inf"), scaler, say=said.append)
    assert len(said) == 1
    spent = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(UserError, match="gradient"):
        tracker.accepts(group, 0.5, float("inf"), spent, say=said.append)
