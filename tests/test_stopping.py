"""How a run is asked to stop: which signals, how often, and what it answers."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
from stack import make_config, make_images, make_world, spawn, train_options, wait_for_steps
from typer.testing import CliRunner

from anima_fast.cli import app
from anima_fast.commands import train as commands
from anima_fast.errors import Stopped, stop_status
from anima_fast.training import events, stopping, validation
from anima_fast.training.loop import train
from anima_fast.training.previews import Previews
from anima_fast.training.stopping import TEXT, StopSignal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture(autouse=True)
def handlers():
    """Puts every handler back, also those that outlast a stop."""
    numbers = [getattr(signal, name) for name in StopSignal.NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    # A shell starts what runs in the background without it.
    before[signal.SIGINT] = signal.default_int_handler
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_is_remembered_and_answered_at_once(name):
    said, answered = [], threading.Event()
    with StopSignal(lambda text: (said.append(text), answered.set())) as stop:
        stop.waits = True
        signal.raise_signal(getattr(signal, name))
        assert answered.wait(timeout=60)
        signal.raise_signal(getattr(signal, name))
    assert stop.received == getattr(signal, name) and said == [TEXT]


def test_within_two_seconds_it_is_one_stop_and_a_later_one_leaves(clock):
    with StopSignal() as stop:
        stop.waits = True
        signal.raise_signal(signal.SIGINT)
        clock.seconds += 1.9
        signal.raise_signal(signal.SIGTERM)
        clock.seconds += 0.2
        with stop.saving():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
    assert stop.received == signal.SIGINT


def test_before_the_first_step_it_ends_the_program_once(clock):
    with StopSignal() as stop, pytest.raises(Stopped) as found:
        signal.raise_signal(signal.SIGUSR1)
    assert found.value.status == 143 and stop.received == signal.SIGUSR1
    # The second one of the same stop, which comes while the program ends.
    signal.raise_signal(signal.SIGINT)
    clock.seconds += 2.1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_after_a_run_without_a_signal(handlers):
    with StopSignal():
        assert signal.getsignal(signal.SIGHUP) != handlers[signal.SIGHUP]
    assert all(signal.getsignal(number) == handler for number, handler in handlers.items())


def test_under_nohup_a_closed_terminal_changes_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        stop.waits = True
        signal.raise_signal(signal.SIGHUP)
        assert stop.received is None


@pytest.mark.parametrize(
    ("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143), ("SIGUSR1", 143)]
)
def test_exit_statuses(monkeypatch, name, status):
    number = getattr(signal, name)
    assert stop_status(number) == status

    def stopped(*_args):
        raise Stopped(number)

    monkeypatch.setattr(commands, "_run", stopped)
    found = CliRunner().invoke(app, ["train"])
    assert found.exit_code == status and "interrupted" in found.output


def test_a_signal_that_comes_twice_saves_once(world, tmp_path):
    process = spawn(train_options(world, tmp_path, max_train_epochs=5000))
    wait_for_steps(tmp_path, 3)
    for _ in range(3):
        process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "lora-autosave-state").is_dir()
    assert len(list(tmp_path.glob("lora-step*.safetensors"))) == 1
    assert TEXT in (tmp_path / "console.log").read_text(encoding="utf-8")


def test_a_signal_before_the_first_step_leaves_no_file(world, tmp_path, monkeypatch):
    real = events.Events.start

    def start(self):
        real(self)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(events.Events, "start", start)
    with pytest.raises(Stopped):
        train(train_options(world, tmp_path))
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*-state"))
    assert (tmp_path / "console.log").read_text(encoding="utf-8").endswith("interrupted\n")


def test_a_validation_in_progress_is_broken_off(tmp_path, monkeypatch):
    images = make_images(tmp_path / "images")
    world = make_world(tmp_path / "world")
    data = make_config(tmp_path / "data.toml", images, subset="validation_split = 0.4")
    forwards, real = [], validation.batch_loss

    def one(*args):
        forwards.append(signal.raise_signal(signal.SIGINT))
        return real(*args)

    monkeypatch.setattr(validation, "batch_loss", one)
    options = {"dataset_config": str(data), "validate_every_n_steps": 1}
    result = train(train_options(world | options, tmp_path / "out"))
    assert (len(forwards), result.steps, result.interrupted_by) == (1, 1, signal.SIGINT)


def test_a_picture_in_progress_is_left_unfinished(world, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tree --w 64 --h 64 --s 5\n" * 2, encoding="utf-8")
    made, real = [], Previews._make_one

    def one(self, prompt, stage, index, on_step):
        made.append(index)
        signal.raise_signal(signal.SIGINT)
        return real(self, prompt, stage, index, on_step)

    monkeypatch.setattr(Previews, "_make_one", one)
    options = train_options(world, tmp_path, sample_prompts=str(prompts), sample_every_n_steps=1)
    result = train(options)
    assert (made, result.steps) == ([0], 1) and not list(tmp_path.glob("sample/*"))
