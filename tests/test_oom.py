"""Out of memory while training: the step is repeated one policy lower, and the run goes on."""

import json

import pytest
import torch
from full_stack import full_options, make_full_world
from stack import make_world, records, same_tensors, train_options

from anima_fast.errors import UserError
from anima_fast.models.block_graphs import BlockGraphs
from anima_fast.models.dit import AnimaDiT
from anima_fast.options.training import MemoryOptions
from anima_fast.training import oom
from anima_fast.training import step as training_step
from anima_fast.training.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def full_world(tmp_path_factory):
    return make_full_world(tmp_path_factory.mktemp("full_world"))


class FullCard:
    """Lets a DiT run out of memory in the middle of chosen calls."""

    def __init__(self, monkeypatch, fails, error=None):
        self.calls, self.fails = 0, set(fails)
        real = AnimaDiT.forward

        def forward(dit, *args, **kwargs):
            out = real(dit, *args, **kwargs)
            self.calls += 1
            if self.calls in self.fails:
                raise error or torch.OutOfMemoryError("CUDA out of memory")
            return out

        monkeypatch.setattr(AnimaDiT, "forward", forward)


GIVEN = {
    "network_dropout": 0.3, "network_args": ("module_dropout=0.3", "rank_dropout=0.2"),
    "gradient_accumulation_steps": 2, "max_train_epochs": 2, "learning_rate": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("fails", [[1], [2], [4]])
@pytest.mark.parametrize("kernels", ["eager", "auto"])
def test_the_run_is_one_that_started_at_the_lower_policy(
    world, tmp_path, monkeypatch, fails, kernels
):
    """Losses and weights, bit for bit, wherever in an accumulation group memory ran out."""
    train(train_options(world, tmp_path / "low", recompute="block", kernels=kernels, **GIVEN))
    FullCard(monkeypatch, fails)
    train(train_options(world, tmp_path / "out", kernels=kernels, **GIVEN))
    assert same_tensors(*(tmp_path / n / "lora.safetensors" for n in ("low", "out")))
    losses = [[r["loss"] for r in records(tmp_path / n, "step")] for n in ("low", "out")]
    assert losses[0] == losses[1]
    bins = [records(tmp_path / n, "sigma_bins") for n in ("low", "out")]
    assert bins[0] == bins[1], "nothing counts twice"
    (event,) = records(tmp_path / "out", "event")
    assert "out of memory" in event["text"] and "--recompute block" in event["text"]
    assert event["step"] == (fails[0] - 1) // 2


def test_it_goes_down_as_often_as_needed(tmp_path, monkeypatch, capsys):
    """A DiT of six blocks: block, three of them swapped, four swapped; the losses stay the same."""
    world = make_world(tmp_path / "world", blocks=6)
    train(train_options(world, tmp_path / "whole"))
    FullCard(monkeypatch, [3, 4, 5])
    train(train_options(world, tmp_path / "out"))
    texts = [event["text"] for event in records(tmp_path / "out", "event")]
    swaps = ["--recompute block,", "--blocks_to_swap 3,", "--blocks_to_swap 4,"]
    assert all(swap in text for swap, text in zip(swaps, texts, strict=True))
    assert capsys.readouterr().err.count("out of memory") == 3
    assert same_tensors(*(tmp_path / n / "lora.safetensors" for n in ("whole", "out")))


def test_graphs_are_given_up_before_a_policy(world, tmp_path, monkeypatch):
    """The recordings hold memory that plain launches do not need."""
    real = oom.MemoryPolicies.__init__

    def with_graphs(self, run, tell):
        real(self, run, tell)
        run.dit.graphs = BlockGraphs()
        run.dit.graphs._graphs["a size"] = None

    monkeypatch.setattr(oom.MemoryPolicies, "__init__", with_graphs)
    FullCard(monkeypatch, [2, 4])
    train(train_options(world, tmp_path, max_train_epochs=2))
    first, second = (event["text"] for event in records(tmp_path, "event"))
    assert "without CUDA graphs" in first and "--recompute block" in second


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"]
)
def test_what_cuda_and_its_libraries_say_counts_too(world, tmp_path, monkeypatch, text):
    FullCard(monkeypatch, [1], RuntimeError(text))
    train(train_options(world, tmp_path, max_train_epochs=1))
    assert len(records(tmp_path, "event")) == 1


def test_another_error_is_not_taken_for_it(world, tmp_path, monkeypatch):
    FullCard(monkeypatch, [1], RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        train(train_options(world, tmp_path, max_train_epochs=1))
    assert not records(tmp_path, "event")


def test_at_the_end_a_state_is_left_and_the_remedy_named(world, tmp_path, monkeypatch):
    given = {"max_train_epochs": 2, "learning_rate": 0.01}
    train(train_options(world, tmp_path / "whole", **given))
    with monkeypatch.context() as patch:
        FullCard(patch, range(4, 100))
        with pytest.raises(UserError, match=r"lowest policy.*--resume auto"):
            train(train_options(world, tmp_path / "out", **given))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "failed"
    train(train_options(world, tmp_path / "out", resume="auto", **given))
    assert same_tensors(*(tmp_path / n / "lora.safetensors" for n in ("whole", "out")))


def test_out_of_memory_elsewhere_is_one_line(world, tmp_path, monkeypatch):
    def step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match="8-bit optimizer"):
        train(train_options(world, tmp_path))
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("swapped", [None, 2])
def test_full_fine_tuning_goes_on_too(full_world, tmp_path, monkeypatch, swapped):
    """One policy lower, with the weights, masters and state where they were."""
    changes = {"blocks_to_swap": swapped, "mixed_precision": "bf16"}
    plain = train(full_options(full_world, tmp_path / "plain", **changes))
    failed, real = [], training_step.micro_step

    def out_of_memory(run, batch, *, step, micro):
        losses = real(run, batch, step=step, micro=micro)
        if step == 2 and not failed:
            failed.append(run.dit.block_runner)
            losses.mean().backward()
            raise torch.OutOfMemoryError("not enough")
        return losses

    monkeypatch.setattr(training_step, "micro_step", out_of_memory)
    again = train(full_options(full_world, tmp_path / "again", **changes))
    assert failed
    assert same_tensors(plain.output, again.output)


def test_a_fused_backward_pass_leaves_no_half_updated_state(full_world, tmp_path, monkeypatch):
    FullCard(monkeypatch, [2])
    with pytest.raises(UserError, match="has changed weights already"):
        train(full_options(full_world, tmp_path, fused_backward_pass=True))
    assert not list(tmp_path.glob("*-state"))


def test_what_is_lower():
    def options(blocks, *, fused, can_swap=True, **given):
        chosen = MemoryOptions(**given)
        below = oom.lower_policies(chosen, blocks=blocks, fused=fused, can_swap=can_swap)
        return [policy.option for policy in below]

    block, swaps = "--recompute block", ["--blocks_to_swap 14", "--blocks_to_swap 26"]
    below = [f"{block} {swap}" for swap in swaps]
    assert options(28, fused=True) == ["--recompute mlp", block, *below]
    assert options(28, fused=False) == [block, *below]
    assert options(28, fused=True, recompute="mlp") == [block, *below]
    assert options(28, fused=True, recompute="12") == [block, *below]
    assert options(28, fused=True, recompute="block") == below
    assert options(28, fused=True, recompute="block", blocks_to_swap=20) == below[1:]
    assert options(28, fused=False, can_swap=False) == [block]
