"""A run saved by an earlier version of the program goes on: its caches, its states, its end.

`golden/resume` was written by version 0.1.0 when states still named modules of the source: a tiny
stack, three images with their caches, two runs of eight steps, the state of each after the fourth
and the LoRA that each ended with.
"""

import inspect
import json
import pkgutil
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stack import train_options

import anima_fast.training
from anima_fast.errors import UserError
from anima_fast.training.checkpoints import describe_optimizer
from anima_fast.training.loop import train
from anima_fast.training.optimizers.flat_adamw import FlatAdamW
from anima_fast.training.state_checks import FORMER_NAMES, check_scheduler, class_name

SAVED = Path(__file__).parent / "golden" / "resume"
RUNS = {
    "adamw": {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "adafactor": {
        "optimizer_type": "AdaFactor",
        "lr_scheduler": "adafactor",
        "optimizer_args": ("relative_step=True", "warmup_init=True"),
    },
}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    shutil.copytree(SAVED, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    # Git does not take a folder of this name.
    Path("images/anima_cache").rename("images/.anima_cache")
    return {
        "pretrained_model_name_or_path": "models/dit.safetensors",
        "qwen3": "models/qwen3",
        "vae": "models/vae.safetensors",
        "t5_tokenizer_path": "models/t5",
        "dataset_config": "data.toml",
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_saved_run_ends_where_the_program_that_saved_it_ended(saved, name):
    caches = {p.name: p.stat().st_mtime_ns for p in Path("images/.anima_cache").iterdir()}
    state = f"out/{name}-step00000004-state"
    length = {"max_train_epochs": None, "max_train_steps": 8, "save_every_n_steps": 8}
    given = {**length, **RUNS[name], "output_name": name, "save_state": True, "resume": state}
    train(train_options(saved, Path("out"), **given))
    now = {p.name: p.stat().st_mtime_ns for p in Path("images/.anima_cache").iterdir()}
    assert {name: now[name] for name in caches} == caches and len(now) <= len(caches) + 1

    ended, expected = (
        load_file(f"out/{name}.safetensors"),
        load_file(f"expected/{name}.safetensors"),
    )
    assert ended.keys() == expected.keys()
    start = load_file(f"{state}/network.safetensors")
    moved = max((ended[k].float() - start[k]).abs().max() for k in start if k.endswith(".weight"))
    # AdaFactor's warm-up makes tiny steps: they must be there, and be the same.
    assert moved > (1e-4 if name == "adamw" else 1e-8)
    for key, tensor in expected.items():
        assert (ended[key].float() - tensor.float()).abs().max() <= 1e-5, key

    for folder, expected_step in ((state, 4), (f"out/{name}-state", 8)):
        schedule = json.loads(Path(folder, "scheduler.json").read_text(encoding="utf-8"))
        assert schedule["state"]["last_epoch"] == expected_step
    assert schedule["class"] in FORMER_NAMES.values()


def test_another_schedule_is_refused_by_the_name_that_states_have_now(tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    old = {"class": "anima_fast.training.schedules.Schedule"}
    with pytest.raises(UserError, match=r"the scheduler anima_fast\.Schedule, this run has torch"):
        check_scheduler(tmp_path, old, schedule)


def test_every_own_class_that_a_state_names_has_a_fixed_name():
    kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    found = {}
    for module in pkgutil.walk_packages(anima_fast.training.__path__, "anima_fast.training."):
        for name, cls in inspect.getmembers(import_module(module.name), inspect.isclass):
            if issubclass(cls, kinds) and cls.__module__.startswith("anima_fast."):
                found[name] = getattr(cls, "saved_name", None) or getattr(cls, "stands_for", None)
    assert {"Schedule", "AdafactorSchedule", "FlatAdamW", "WeightUpdates"} <= found.keys()
    assert all(found.values()), found


def test_flat_adamw_is_called_what_it_stands_for():
    flat = torch.zeros(4, requires_grad=True)
    optimizer = FlatAdamW([{"params": [flat]}], flat, torch.zeros(4), lr=1e-3, weight_decay=0.1)
    described = describe_optimizer(optimizer, {"weight_decay": 0.1})
    assert described == "torch.optim.adamw.AdamW(weight_decay=0.1)"
    assert class_name(optimizer) == "torch.optim.adamw.AdamW"
