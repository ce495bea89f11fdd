"""Full fine-tuning that is stopped and goes on: bit for bit what an uninterrupted run computes."""

import dataclasses
import os
import signal

import pytest
from full_stack import full_options, log_lines, make_full_world
from stack import same_tensors, spawn, wait_for_steps

from anima_fast.errors import UserError
from anima_fast.training.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_full_world(tmp_path_factory.mktemp("world"))


KINDS = {
    "fp32": {},
    "stochastic": {"full_bf16": True},
    "masters": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
    "fp16": {"mixed_precision": "fp16"},
    "plain": {"full_bf16": True, "weight_update": "plain"},
    "8bit": {"optimizer_type": "AdamW8bit", "full_bf16": True},
    "adafactor fused": {"optimizer_type": "AdaFactor", "fused_backward_pass": True},
    "swap": {"blocks_to_swap": 2, "full_bf16": True},
    "swap 8bit": {"blocks_to_swap": 2, "optimizer_type": "AdamW8bit"},
    "prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1.0, "mixed_precision": "bf16"},
    "schedule-free": {"optimizer_type": "AdamWScheduleFree"},
    "lion": {"optimizer_type": "Lion", "full_bf16": True},
    "parts": {"mlp_lr": 2e-3, "self_attn_lr": 0.0, "lr_scheduler": "cosine"},
}
PACKAGES = {"prodigy": "prodigyopt", "schedule-free": "schedulefree", "lion": "lion_pytorch"}


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_a_state_gives_the_same_file(world, tmp_path, kind):
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])
    options = full_options(
        world, tmp_path / "whole", max_train_epochs=2, save_every_n_steps=2, save_state=True,
        **KINDS[kind],
    )  # fmt: skip
    whole = train(options)
    states = sorted((tmp_path / "whole").glob("full-step*-state"))
    assert states
    again = dataclasses.replace(
        options, output_dir=str(tmp_path / "again"), resume=str(states[-1]), save_state=False
    )
    result = train(again)
    assert same_tensors(result.output, whole.output)
    last = {line["step"]: line["loss"] for line in log_lines(result)}
    assert last.items() <= {line["step"]: line["loss"] for line in log_lines(whole)}.items()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("kind", ["fp32", "stochastic"])
def test_a_killed_run_goes_on_to_the_same_file(world, tmp_path, kind):
    changes = {"max_train_epochs": 6, "autosave_minutes": 1e-6, **KINDS[kind]}
    whole = train(full_options(world, tmp_path / "whole", **changes))
    options = full_options(world, tmp_path / "cut", **changes)
    process = spawn(options)
    wait_for_steps(tmp_path / "cut", 6)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (tmp_path / "cut" / "full.safetensors").exists()
    result = train(dataclasses.replace(options, resume="auto"))
    assert same_tensors(result.output, whole.output)
    lines = [(line["step"], line["loss"]) for line in log_lines(result)]
    assert lines == [(line["step"], line["loss"]) for line in log_lines(whole)]
    # The rolling state is gone when the run is over, and so is its predecessor.
    assert not [p for p in (tmp_path / "cut").iterdir() if "state" in p.name]


def test_one_rolling_state_is_kept(world, tmp_path, monkeypatch):
    """The one before is there until the new one is whole, and not afterwards."""
    from anima_fast.training.checkpoints import Checkpoints

    seen = []
    final = Checkpoints.final

    def spy(self):
        seen.extend(sorted(p.name for p in tmp_path.iterdir() if "state" in p.name))
        return final(self)

    monkeypatch.setattr(Checkpoints, "final", spy)
    train(full_options(world, tmp_path, autosave_minutes=1e-6))
    assert seen == ["full-autosave-state"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlp_lr": 0.0}, "tensors are trained no more .*learning rates of that run"),
        ({"full_bf16": True, "weight_update": "stochastic"}, "was F32, is bfloat16"),
        ({"optimizer_type": "AdaFactor"}, "same --optimizer_type, or start again with --pre"),
    ],
    ids=["parts", "precision", "optimizer"],
)
def test_a_state_of_another_run_is_explained(world, tmp_path, changes, words):
    options = full_options(world, tmp_path, save_state=True)
    train(options)
    other = dataclasses.replace(options, resume=str(tmp_path / "full-state"), **changes)
    with pytest.raises(UserError, match=words):
        train(other)


def test_a_state_of_another_dataset_names_the_model_option(world, tmp_path):
    options = full_options(world, tmp_path, save_state=True)
    train(options)
    changed = dataclasses.replace(
        options, gradient_accumulation_steps=2, resume=str(tmp_path / "full-state")
    )
    with pytest.raises(UserError, match=r"another run.*--pretrained_model_name_or_path"):
        train(changed)


def test_a_saved_model_can_be_trained_further(world, tmp_path):
    first = train(full_options(world, tmp_path / "first"))
    further = world | {"pretrained_model_name_or_path": str(first.output)}
    second = train(full_options(further, tmp_path / "second"))
    assert not same_tensors(first.output, second.output)
