"""Resume states: exact continuation, damage, another run, and kills at every instant."""

import json
import os
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_fast import files
from anima_fast.errors import UserError
from anima_fast.measure.arithmetic import Arithmetic
from anima_fast.options.run import TrainOptions
from anima_fast.training import state, state_files
from anima_fast.training.optimizers.build import build_optimizer
from anima_fast.training.optimizers.schedules import build_scheduler
from anima_fast.training.run import Position, SigmaBins
from anima_fast.training.state import load_state, save_state
from anima_fast.training.state_checks import LORA_REMEDIES, dataset_fingerprint
from anima_fast.training.state_files import damage, find_states, resolve_resume, state_record

TOTAL = 20


class TinyNetwork:
    """Two LoRA pairs in one flat buffer, with the interface that states use."""

    def __init__(self, rank=8, width=320, rate=1e-2, alpha=4.0):
        shapes = {"down": (rank, width), "up": (width, rank)}
        self.names = {
            f"lora_unet_blocks_{block}_mlp_layer1.lora_{part}.weight": shape
            for block in range(2)
            for part, shape in shapes.items()
        }
        generator = torch.Generator().manual_seed(1)
        count = sum(a * b for a, b in self.names.values())
        self.flat = torch.randn(count, generator=generator)
        self.flat_grad = torch.zeros_like(self.flat)
        self.rate, self.alpha = rate, torch.tensor(alpha)
        self.views, at = {}, 0
        for name, shape in self.names.items():
            size = shape[0] * shape[1]
            self.views[name] = (at, at + size, shape)
            at += size
        self.half = at // 2

    def param_groups(self, flat=True):
        groups = []
        for index, (start, end) in enumerate([(0, self.half), (self.half, len(self.flat))]):
            pieces = [(start, end, (-1,))]
            if not flat:
                pieces = [piece for piece in self.views.values() if start <= piece[0] < end]
            params = [torch.nn.Parameter(self.flat[a:b].view(s)) for a, b, s in pieces]
            for param, (a, b, s) in zip(params, pieces, strict=True):
                param.grad = self.flat_grad[a:b].view(s)
            groups.append({"params": params, "lr": self.rate, "name": f"group{index}"})
        return groups

    def state_tensors(self, dialect="kohya", dtype=None):
        tensors = {n: self.flat[a:b].view(s) for n, (a, b, s) in self.views.items()}
        alphas = {f"{n.rsplit('.', 2)[0]}.alpha": self.alpha for n in self.names}
        return {**tensors, **alphas}

    def load(self, path):
        tensors = load_file(path)
        for name, (start, end, _) in self.views.items():
            self.flat[start:end] = tensors.pop(name).flatten()
        return [name for name in tensors if not name.endswith(".alpha")]


class Run:
    """A network, its optimizer and its schedule, and deterministic steps."""

    def __init__(self, options, total=TOTAL, **network):
        self.network = TinyNetwork(rate=options.learning_rate, **network)
        self.optimizer, _ = build_optimizer(options, self.network.param_groups)
        self.scheduler = build_scheduler(
            options, self.optimizer, total, learning_rate=options.learning_rate
        )
        self.scaler = torch.amp.GradScaler("cpu", enabled=options.mixed_precision == "fp16")
        self.sigma_bins = SigmaBins(torch.device("cpu"))
        precision = options.mixed_precision
        self.training = types.SimpleNamespace(
            ema=None, remedies=LORA_REMEDIES, arithmetic=Arithmetic(precision, 0, "", precision)
        )
        self.seed, self.fingerprint, self.id = 11, {}, "one"

    def steps(self, first, last):
        for step in range(first, last):
            noise = torch.randn(
                self.network.flat.shape, generator=torch.Generator().manual_seed(step)
            )
            self.network.flat_grad.copy_(self.network.flat - 0.5 + 0.1 * noise)
            self.optimizer.step()
            self.scheduler.step()
        return self

    def save(self, folder, step=7, **others):
        position = Position(step=step, epoch=2, batch=1, losses=[0.1, 0.2])
        save_state(folder, self, position, **others)
        return position


def test_the_newest_state_has_the_most_steps_of_its_run(tmp_path, monkeypatch):
    """The clock went back while the run was under way; another run of this name is older."""
    times = {"run-000009-state": 100.0, "run-000001-state": 300.0, "run-000002-state": 200.0}
    for index, (name, moment) in enumerate(times.items()):
        run = Run(options())
        run.id = "other" if index == 0 else "this"
        monkeypatch.setattr(state.time, "time", lambda moment=moment: moment)
        run.save(tmp_path / name, step=(90, 1, 2)[index])
    assert resolve_resume("auto", tmp_path, "run") == tmp_path / "run-000002-state"


def load(folder, run):
    """The position of a state that is loaded into a run, and what is said."""
    notices = []
    return load_state(folder, run, say=notices.append), notices


def options(kind="AdamW", **others):
    return TrainOptions(optimizer_type=kind, **others)


CASES = [
    {"kind": "AdamW", "lr_scheduler": "cosine", "lr_warmup_steps": 3},
    {"kind": "AdamW8bit", "lr_scheduler": "linear"},
    {"kind": "PagedAdamW32bit"},
    {"kind": "Lion8bit"},
    {"kind": "Lion"},
    {"kind": "SGDNesterov"},
    {"kind": "Prodigy", "learning_rate": 1.0, "lr_scheduler": "cosine"},
    {"kind": "DAdaptAdam", "learning_rate": 1.0},
    {"kind": "AdaFactor"},
    {"kind": "AdaFactor", "optimizer_args": ("warmup_init=True",)},
    {"kind": "AdamWScheduleFree"},
    {"kind": "RAdam", "lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=3",)},
    {"kind": "bitsandbytes.optim.AdEMAMix8bit"},
]
PACKAGES = {
    "Lion": "lion_pytorch",
    "Prodigy": "prodigyopt",
    "DAdaptAdam": "dadaptation",
    "AdamWScheduleFree": "schedulefree",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["kind"])
def test_a_resumed_run_is_bit_identical(case, tmp_path):
    if case["kind"] in PACKAGES:
        pytest.importorskip(PACKAGES[case["kind"]])
    whole = Run(options(**case)).steps(0, TOTAL)
    first = Run(options(**case)).steps(0, 7)
    position = first.save(tmp_path / "run-state")
    resumed = Run(options(**case))
    assert state_record(tmp_path / "run-state")["seed"] == 11
    assert load(tmp_path / "run-state", resumed) == (position, [])
    assert torch.equal(resumed.network.flat, first.network.flat)
    resumed.steps(7, TOTAL)
    assert torch.equal(resumed.network.flat, whole.network.flat)
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def test_no_file_of_a_state_is_a_pickle(tmp_path):
    Run(options("AdamW8bit")).steps(0, 2).save(tmp_path / "run-state")
    assert {path.suffix for path in (tmp_path / "run-state").iterdir()} == {".json", ".safetensors"}


def test_the_loss_scale_is_restored(tmp_path):
    first = Run(options(mixed_precision="fp16"))
    first.scaler.load_state_dict({**first.scaler.state_dict(), "scale": 128.0})
    first.save(tmp_path / "run-state")
    second = Run(options(mixed_precision="fp16"))
    load(tmp_path / "run-state", second)
    assert second.scaler.state_dict()["scale"] == 128.0


FILES = (
    "state.json", "network.safetensors", "optimizer.json", "optimizer.safetensors",
    "scheduler.json", "scaler.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["one bit", "cut", "empty", "gone"])
def test_damage_of_any_file_is_found_and_the_state_before_is_offered(name, how, tmp_path):
    run = Run(options())
    run.steps(0, 2).save(tmp_path / "run-000001-state", step=2)
    run.steps(2, 4).save(tmp_path / "run-000002-state", step=4)
    newest = tmp_path / "run-000002-state"
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    data = bytearray((newest / name).read_bytes())
    if how == "one bit":
        data[len(data) // 2] ^= 1
    (newest / name).write_bytes({"cut": data[:-3], "empty": b""}.get(how, data))
    if how == "gone":
        (newest / name).unlink()
    fresh = Run(options())
    before = fresh.network.flat.clone()
    with pytest.raises(UserError, match="damaged") as caught:
        load(newest, fresh)
    assert f"--resume {tmp_path / 'run-000001-state'}" in str(caught.value)
    assert torch.equal(fresh.network.flat, before)
    assert resolve_resume("auto", tmp_path, "run") == tmp_path / "run-000001-state"


def test_a_damaged_state_alone_says_to_start_again(tmp_path):
    Run(options()).save(tmp_path / "run-state")
    (tmp_path / "run-state" / "state.json").write_text("{}", encoding="utf-8")
    for use in (
        lambda: load(tmp_path / "run-state", Run(options())),
        lambda: state_record(tmp_path / "run-state"),
    ):
        with pytest.raises(UserError, match="start again without --resume"):
            use()
    with pytest.raises(UserError, match="every resume state"):
        resolve_resume("auto", tmp_path, "run")


def test_a_state_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("anima_fast.training.state_files.FORMAT", 99)
    Run(options()).save(tmp_path / "run-state")
    monkeypatch.undo()
    with pytest.raises(UserError, match="format is 99"):
        load(tmp_path / "run-state", Run(options()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rank": 4}, r"was \[8, 320\], is \[4, 320\]"), ({"alpha": 2.0}, "alpha was 4, is 2")],
)
def test_another_network_is_explained(changed, message, tmp_path):
    Run(options()).save(tmp_path / "run-state")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "run-state", Run(options(), **changed))


def test_other_targets_are_explained(tmp_path):
    first, second = Run(options()), Run(options())
    first.save(tmp_path / "run-state")
    tensors = second.network.state_tensors()
    tensors["lora_unet_new.alpha"] = tensors.pop("lora_unet_blocks_0_mlp_layer1.alpha")
    second.network.state_tensors = lambda: tensors
    with pytest.raises(UserError, match=r"no more .*blocks_0.*are new .*lora_unet_new"):
        load(tmp_path / "run-state", second)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (options("AdamW8bit"), "--optimizer_type"),
        (options(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=2",)), "StepLR"),
    ],
    ids=["optimizer", "scheduler"],
)
def test_another_optimizer_or_scheduler_is_refused(changed, message, tmp_path):
    Run(options()).save(tmp_path / "run-state")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "run-state", Run(changed))


def plan(**changed):
    dataset = types.SimpleNamespace(batch_size=changed.get("batch_size", 2))
    items = [
        types.SimpleNamespace(
            path=types.SimpleNamespace(name=name),
            bucket=(1024, 1024),
            repeats=1,
            is_reg=False,
            dataset=dataset,
        )
        for name in changed.get("names", ["a.png", "b.png", "c.png"])
    ]
    return types.SimpleNamespace(items=items, batches_per_epoch=2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"names": ["a.png", "b.png"]}, "number of images was 3, is 2"),
        ({"names": ["a.png", "b.png", "d.png"]}, "image files"),
        ({"batch_size": 1}, "batch sizes"),
    ],
)
def test_another_dataset_is_explained(changed, message, tmp_path):
    first, fresh = Run(options()), Run(options())
    first.fingerprint = fresh.fingerprint = dataset_fingerprint(plan())
    first.save(tmp_path / "run-state")
    load(tmp_path / "run-state", fresh)
    fresh.fingerprint = dataset_fingerprint(plan(**changed))
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "run-state", fresh)
    assert "--network_weights" in str(caught.value)


def test_a_new_rate_and_a_new_length_are_used_with_a_notice(tmp_path):
    old = options(learning_rate=1e-2, lr_scheduler="linear")
    Run(old).steps(0, 10).save(tmp_path / "run-state", step=10)
    new = options(learning_rate=2e-2, lr_scheduler="linear")
    resumed = Run(new, total=40)
    _, notices = load(tmp_path / "run-state", resumed)
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [2e-2 * 30 / 40] * 2
    assert any("from 0.01 to 0.02" in notice for notice in notices)
    assert any("40 steps instead of 20" in notice for notice in notices)


def test_optimizer_arguments_that_stay_are_told(tmp_path):
    Run(options()).save(tmp_path / "run-state")
    resumed = Run(options(optimizer_args=("weight_decay=0.5",)))
    _, notices = load(tmp_path / "run-state", resumed)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert notices == ["optimizer_args: weight_decay stays 0.01 as in the state, not 0.5"]


def test_other_versions_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(state_files, "versions", lambda: {"torch": "1.0"})
    Run(options()).save(tmp_path / "run-state")
    monkeypatch.undo()
    _, notices = load(tmp_path / "run-state", Run(options()))
    assert any("made with 1.0" in notice for notice in notices)


def test_a_state_of_sd_scripts_gives_its_weights_only(tmp_path):
    folder = tmp_path / "run-000003-state"
    folder.mkdir()
    source = TinyNetwork()
    source.flat += 1
    tensors = {key: t.clone() for key, t in source.state_tensors().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "train_state.json").write_text(
        json.dumps({"current_epoch": 3, "current_step": 30}), encoding="utf-8"
    )
    run = Run(options())
    assert resolve_resume(str(folder), tmp_path, "run") == folder
    assert state_record(folder) is None
    position, notices = load(folder, run)
    assert position == Position()
    assert torch.equal(run.network.flat, source.flat)
    assert "only its network weights" in notices[0]


def test_states_are_found_newest_first(tmp_path):
    run = Run(options())
    names = ["run-000001-state", "run-step00000020-state", "run-autosave-state", "run-state"]
    for name in names:
        run.save(tmp_path / name)
    run.save(tmp_path / "other-state")
    run.save(tmp_path / "run-extra-state")
    (tmp_path / "run-file-state").write_text("no folder", encoding="utf-8")
    found = [path.name for path in find_states(tmp_path, "run")]
    assert found == names[::-1]
    assert find_states(tmp_path)[0].name == "run-extra-state"
    assert find_states(tmp_path / "nowhere", "run") == []
    assert resolve_resume("auto", tmp_path, "run").name == "run-state"
    assert resolve_resume(str(tmp_path), tmp_path, "run").name == "run-state"
    assert resolve_resume(str(tmp_path / "run-000001-state"), None).name == "run-000001-state"


def test_runs_without_a_name_find_their_epochs_and_steps(tmp_path):
    for name in ("epoch-000001-state", "at-step00000020-state", "last-autosave-state"):
        Run(options()).save(tmp_path / name)
    assert len(find_states(tmp_path, "last")) == 3


def test_nothing_to_resume(tmp_path):
    assert resolve_resume(None, tmp_path, "run") is None
    assert resolve_resume("auto", tmp_path, "run") is None
    assert resolve_resume("auto", tmp_path / "nowhere", "run") is None
    with pytest.raises(UserError, match="does not exist"):
        resolve_resume(str(tmp_path / "nowhere"), tmp_path, "run")
    with pytest.raises(UserError, match="holds no resume state"):
        resolve_resume(str(tmp_path), tmp_path, "run")


def test_an_autosave_keeps_the_one_before(tmp_path):
    run = Run(options())
    for step in (1, 2, 3):
        run.save(tmp_path / "run-autosave-state", step=step, keep_previous=True)
    found = find_states(tmp_path, "run")
    assert [path.name for path in found] == ["run-autosave-state", "run-autosave-state.prev"]
    assert [load(path, Run(options()))[0].step for path in found] == [3, 2]


def steps_found(folder):
    """Steps of the whole states a later run would see, newest first."""
    whole = [path for path in find_states(folder, "run") if damage(path) is None]
    return [load(path, Run(options()))[0].step for path in whole]


def count_calls(monkeypatch, at, act):
    """Before and after the `at`-th disk operation call `act`; returns the counter."""
    counter = [0]

    def wrap(function):
        def wrapped(*args, **kwargs):
            for after in (False, True):
                if after:
                    result = function(*args, **kwargs)
                if counter[0] == at:
                    act()
                counter[0] += 1
            return result

        return wrapped

    for owner, name in [
        (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (files, "sync_folder"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    return counter


def operations(monkeypatch, tmp_path, keep_previous):
    """How many instants a save has."""
    run = Run(options())
    run.save(tmp_path / "count" / "run-autosave-state", keep_previous=keep_previous)
    with monkeypatch.context() as patch:
        counter = count_calls(patch, -1, None)
        run.save(tmp_path / "count" / "run-autosave-state", keep_previous=keep_previous)
    return counter[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed cheaply")
@pytest.mark.parametrize("keep_previous", [False, True])
def test_a_kill_at_any_instant_leaves_a_whole_state(keep_previous, tmp_path, monkeypatch):
    run = Run(options())
    total = operations(monkeypatch, tmp_path, keep_previous)
    assert total > 20
    seen = set()
    for instant in range(total):
        folder = tmp_path / f"kill{instant}"
        run.save(folder / "run-autosave-state", step=1, keep_previous=keep_previous)
        child = os.fork()
        if child == 0:
            # Leaves like kill -9: no finally block, no clean-up.
            count_calls(monkeypatch, instant, lambda: os._exit(9))
            run.save(folder / "run-autosave-state", step=2, keep_previous=keep_previous)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        newest = steps_found(folder)[0]
        assert newest in (1, 2)
        seen.add(newest)
        named = resolve_resume(str(folder / "run-autosave-state"), folder, "run")
        assert named.exists()
        # The next save works and cleans up after the killed one.
        run.save(folder / "run-autosave-state", step=3, keep_previous=keep_previous)
        assert steps_found(folder)[0] == 3
        assert not list(folder.glob(".*.tmp"))
    assert seen == {1, 2}


def test_a_full_disk_at_any_write_keeps_the_state_before(tmp_path, monkeypatch):
    run = Run(options())

    def disk_full():
        raise OSError(28, "No space left on device")

    for instant in range(operations(monkeypatch, tmp_path, True)):
        folder = tmp_path / f"full{instant}"
        run.save(folder / "run-autosave-state", step=1, keep_previous=True)
        with monkeypatch.context() as patch:
            count_calls(patch, instant, disk_full)
            with pytest.raises((UserError, OSError)):
                run.save(folder / "run-autosave-state", step=2, keep_previous=True)
        assert steps_found(folder)[0] in (1, 2)


def test_an_optimizer_state_that_cannot_be_saved_is_refused(tmp_path):
    run = Run(options())
    run.optimizer.param_groups[0]["strange"] = object()
    with pytest.raises(UserError, match="object"):
        run.save(tmp_path / "run-state")
    assert not (tmp_path / "run-state").exists()
