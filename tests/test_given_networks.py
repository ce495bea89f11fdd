"""Network files that a run starts from: base_weights, network_weights, dim_from_weights."""

import pytest
import torch
from stack import make_world, train_options
from test_formats import assert_same, make_parts
from tiny_dit import adapter_weights, make_dit, relative_error

from anima_fast.adapters.formats import read_lora, write_lora
from anima_fast.adapters.lora import merge_lora
from anima_fast.errors import UserError
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.training.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """Finished networks by kind."""
    settings = {
        "lora": {"network_dim": 8},
        "lokr": {"network_module": "networks.lokr"},
        "dora": {"network_args": ("dora_wd=True",)},
    }
    folder = tmp_path_factory.mktemp("files")
    return {
        kind: str(train(train_options(world, folder / kind, max_train_epochs=1, **given)).output)
        for kind, given in settings.items()
    }


def make_adapter():
    return load_llm_adapter(adapter_weights(), dtype=torch.float32)


def both_parts(name):
    """Parts of a layer of the DiT and of another layer, both as in the tiny models."""
    return make_parts(["blocks.0.mlp.layer1", name], inputs=64, outputs=128)


def run(world, folder, **changes):
    return train(train_options(world, folder, max_train_epochs=1, **changes))


def test_adapters_of_the_text_path_are_merged_where_its_models_are(tmp_path):
    name = "llm_adapter.blocks.0.mlp.0"
    parts = both_parts(name)
    path = tmp_path / "both.safetensors"
    write_lora(path, parts, "kohya")
    adapter = make_adapter()
    before = adapter.get_submodule("blocks.0.mlp.0").weight.detach().clone()
    assert merge_lora(make_dit(), path, 0.5, llm_adapter=adapter) == 0
    change = adapter.get_submodule("blocks.0.mlp.0").weight.detach() - before
    assert relative_error(change, 0.5 * parts[name].matrix()) < 1e-5
    assert merge_lora(make_dit(), path) == 1


def test_what_is_not_merged_is_said(world, tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_lora(path, make_parts(["llm_adapter.blocks.0.mlp.0"], inputs=32, outputs=128), "kohya")
    base, said, losses = (str(path),), [], []
    for folder, cached in ((tmp_path / "cached", True), (tmp_path / "live", False)):
        given = {"network_train_unet_only": True, "cache_text_encoder_outputs": cached}
        losses.append(run(world, folder, base_weights=base, **given).loss)
        text = (folder / "console.log").read_text(encoding="utf-8")
        said.append("only without --cache_text_encoder_outputs" in text)
    assert said == [True, False]
    assert losses[0] != pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("lokr", {"scale_weight_norms": 1.0}, "takes a LoKr"),
        ("dora", {"scale_weight_norms": 1.0}, "takes a DoRA"),
        ("lokr", {"tlora_min_rank": 1}, "takes a LoKr"),
        ("lokr", {"network_dropout": 0.1}, "takes a LoKr"),
    ],
)
def test_options_that_a_taken_network_cannot_follow_are_refused(
    world, files, tmp_path, kind, given, message
):
    start = {"network_weights": files[kind], "dim_from_weights": True}
    with pytest.raises(UserError, match=message):
        run(world, tmp_path, **start, **given)


def test_a_taken_network_has_the_ranks_and_modules_of_its_file(world, files, tmp_path, capsys):
    """Also where options say otherwise, which is told."""
    result = run(
        world, tmp_path, network_weights=files["lora"], dim_from_weights=True, tlora_min_rank=6,
        network_args=("train_block_indices=1", "network_reg_dims=.*=2"),
    )  # fmt: skip
    found, given = read_lora(result.output)[0], read_lora(files["lora"])[0]
    assert found.keys() == given.keys()
    assert {part.rank for part in found.values()} == {8}
    notices = train_options(
        world, tmp_path, network_weights=files["lora"], dim_from_weights=True,
        network_args=("train_block_indices=1", "network_reg_dims=.*=2"),
    ).notices  # fmt: skip
    assert any("train_block_indices, network_reg_dims" in notice for notice in notices)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network_args": ("train_block_indices=14-27",)}, "blocks 0 to 1"),
        (
            {"network_args": ("train_block_indices=2",), "cache_text_encoder_outputs": False},
            "blocks 0 to 1",
        ),
        ({"network_args": ("exclude_patterns=.*",)}, "no module is left"),
        ({"network_weights": "lora"}, "is a LoRA of rank 8"),
        ({"network_weights": "lokr"}, "this network has a LoRA of rank 4"),
        ({"network_weights": "dora"}, "is a DoRA"),
        ({"base_weights": "other"}, "made for another size"),
        (
            {"network_weights": "lokr", "dim_from_weights": True, "lora_format": "diffusers"},
            "plain LoRA only",
        ),
    ],
)  # fmt: skip
def test_a_network_that_does_not_fit_is_refused_before_anything_is_encoded(
    world, files, tmp_path, monkeypatch, given, message
):
    other = tmp_path / "other.safetensors"
    write_lora(other, make_parts(["blocks.2.mlp.layer1"]), "kohya")
    for name in ("network_weights", "base_weights"):
        if name in given:
            path = {**files, "other": str(other)}[given[name]]
            given = {**given, name: (path,) if name == "base_weights" else path}
    monkeypatch.setattr("anima_fast.training.setup.encode_dataset", None)
    with pytest.raises(UserError, match=message):
        run(world, tmp_path / "out", **given)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_early_check_leaves_no_trace(world, files, tmp_path, kind):
    """A network that fits is made again on the model itself, with its values."""
    result = run(
        world, tmp_path, network_weights=files[kind], dim_from_weights=True, learning_rate=1e-12
    )
    found, given = read_lora(result.output)[0], read_lora(files[kind])[0]
    for name, part in given.items():
        if part.dora_scale is not None:
            assert torch.allclose(found[name].dora_scale, part.dora_scale, atol=1e-6)
        assert relative_error(found[name].down, part.down) < 1e-5


def test_a_refused_merge_of_the_text_path_changes_nothing(tmp_path):
    parts = both_parts("llm_adapter.blocks.9.mlp.0")
    write_lora(tmp_path / "deep.safetensors", parts, "kohya")
    dit = make_dit()
    with pytest.raises(UserError, match=r"llm_adapter\.blocks\.9"):
        merge_lora(dit, tmp_path / "deep.safetensors", llm_adapter=make_adapter())
    assert_same(dit.state_dict(), make_dit().state_dict())


def test_a_state_goes_on_with_the_files_that_were_merged_only(world, files, tmp_path):
    given = {"base_weights": (files["lora"],), "base_weights_multiplier": (0.5,)}
    run(world, tmp_path / "a", save_state_on_train_end=True, **given)
    state = str(tmp_path / "a" / "lora-state")
    for changes in ({}, {**given, "base_weights_multiplier": ()}):
        with pytest.raises(UserError, match="base_weights was"):
            run(world, tmp_path / "b", resume=state, **changes)
    options = train_options(world, tmp_path / "c", max_train_epochs=2, resume=state, **given)
    assert train(options).steps > 0
