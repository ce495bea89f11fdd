"""A LoRA from the difference of two checkpoints."""

import dataclasses

import pytest
import torch
from finished import write_checkpoint, write_network
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_dit import TINY, dit_shapes, dit_weights, make_inputs, relative_error
from typer.testing import CliRunner

from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.lora import merge_lora
from anima_fast.cli import app
from anima_fast.demo.tiny_stack import random_weights
from anima_fast.errors import UserError
from anima_fast.files import sha256_file
from anima_fast.models.dit import DitConfig, load_dit
from anima_fast.tools.extract import extract_lora
from anima_fast.tools.merge import merge_into_checkpoint
from anima_fast.tools.ranks import RankRule, total_error

Q = "blocks.0.self_attn.q_proj"
WEIGHT = "blocks__0__self_attn__q_proj__weight"


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base.safetensors")


def changed(source, path, **changes):
    """A copy of a checkpoint with tensors replaced, `__` standing for a dot."""
    tensors = load_file(source)
    for name, change in changes.items():
        key = "net." + name.replace("__", ".")
        tensors[key] = tensors[key] + change
    save_file(tensors, path)
    return path


def refusal(*args, **options):
    with pytest.raises(UserError) as error:
        extract_lora(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
@pytest.mark.parametrize("dialect", ["kohya", "comfyui", "diffusers"])
def test_a_merged_lora_comes_back(tmp_path, base, prefix, dialect):
    network = write_network(tmp_path / "net.safetensors", rank=4)
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    other = write_checkpoint(tmp_path / "other.safetensors", prefix)
    merge_into_checkpoint(other, [(network, 0.7)], tuned, precision="fp32")
    found = extract_lora(base, tuned, out, RankRule(4), dialect=dialect)
    assert total_error(found.losses) < 1e-5 and (found.same, found.outside) == (0, {})
    old, (new, written, _) = read_lora(network)[0], read_lora(out)
    assert written == dialect and new.keys() == old.keys()
    for name, part in new.items():
        whole = 0.7 * old[name].matrix()
        assert (part.matrix() - whole).norm() < 1e-5 * whole.norm(), name
        assert part.scale == 1 and part.rank == 4
        torch.testing.assert_close(part.up.norm(dim=0), part.down.norm(dim=1))


def test_the_extracted_lora_does_what_the_tuned_checkpoint_does(tmp_path, base):
    generator = torch.Generator().manual_seed(5)
    weights = load_file(base)
    tuned = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        if ".blocks." in key and "_proj" in key and "llm" not in key
        else tensor
        for key, tensor in weights.items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "out.safetensors"
    expected = load_dit(tuned, dtype=torch.float32)(*make_inputs())
    errors, losses = [], []
    for rank in (1, 16, 64):
        found = extract_lora(base, tmp_path / "tuned.safetensors", out, RankRule(rank))
        assert found.same == 6 and len(found.losses) == 24
        dit = load_dit(base, dtype=torch.float32)
        merge_lora(dit, out)
        errors.append(relative_error(dit(*make_inputs()), expected))
        losses.append(total_error(found.losses))
    assert errors[0] > errors[1] > 1e-3 and errors[2] < 1e-5
    assert losses[0] > 0.9 > losses[1] > losses[2] and losses[2] < 1e-6


def test_each_module_is_the_best_approximation_and_told_so(tmp_path, base):
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    tuned = changed(base, tmp_path / "tuned.safetensors", **{WEIGHT: noise})
    out = tmp_path / "out.safetensors"
    for precision, rel in (("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 1e-2)):
        found = extract_lora(base, tuned, out, RankRule(6), precision=precision)
        (loss,) = found.losses
        assert (loss.name, loss.rank, found.same) == (Q, 6, 29)
        whole = (load_file(tuned)[f"net.{Q}.weight"] - load_file(base)[f"net.{Q}.weight"]).double()
        lost = (read_lora(out)[0][Q].matrix() - whole).norm().item()
        best = torch.linalg.svdvals(whole)[6:].norm().item()
        assert (loss.lost, loss.norm) == pytest.approx((lost, whole.norm().item()), rel=1e-5)
        assert lost == pytest.approx(best, rel=rel)
    found = extract_lora(base, tuned, out, RankRule.of(energy=0.5))
    assert found.losses[0].error == pytest.approx(0.5**0.5, abs=0.03)


def test_what_a_lora_cannot_hold_is_told(tmp_path, base):
    tuned = changed(
        base,
        tmp_path / "tuned.safetensors",
        blocks__0__self_attn__q_proj__weight=torch.full((64, 64), 0.1),
        blocks__1__self_attn__q_norm__weight=0.5,
        blocks__2__adaln_modulation_mlp__1__weight=torch.ones(8, 64),
        llm_adapter__blocks__0__mlp__0__weight=0.25,
        llm_adapter__blocks__0__mlp__0__bias=0.25,
    )
    out = tmp_path / "out.safetensors"
    found = extract_lora(base, tuned, out, RankRule(2))
    assert [loss.name for loss in found.losses] == [Q]
    assert set(found.outside) == {
        "blocks.1.self_attn.q_norm.weight",
        "blocks.2.adaln_modulation_mlp.1.weight",
        "llm_adapter.blocks.0.mlp.0.weight",
        "llm_adapter.blocks.0.mlp.0.bias",
    }
    assert list(found.outside.values()) == sorted(found.outside.values(), reverse=True)
    norm = load_file(base)["net.blocks.1.self_attn.q_norm.weight"]
    told = found.outside["blocks.1.self_attn.q_norm.weight"]
    assert told == pytest.approx((0.5 * norm.numel() ** 0.5 / norm.norm()).item(), rel=1e-5)
    # Patterns and the adapter's option reach the linear ones.
    include = [r"blocks\.2\.adaln_modulation_mlp\..*"]
    found = extract_lora(base, tuned, out, RankRule(2), include=include, llm_adapter=True)
    names = {loss.name for loss in found.losses}
    assert names == {Q, "blocks.2.adaln_modulation_mlp.1", "llm_adapter.blocks.0.mlp.0"}
    assert set(found.outside) == {
        "blocks.1.self_attn.q_norm.weight",
        "llm_adapter.blocks.0.mlp.0.bias",
    }
    found = extract_lora(base, tuned, out, RankRule(2), llm_adapter=True, exclude=[r".*q_proj"])
    assert [loss.name for loss in found.losses] == ["llm_adapter.blocks.0.mlp.0"]


def test_dtypes_may_differ(tmp_path, base):
    half = write_checkpoint(tmp_path / "half.safetensors", "", dtype=torch.bfloat16)
    found = extract_lora(base, half, tmp_path / "out.safetensors", RankRule(4))
    # Only the rounding of bfloat16 is left, which has no low rank.
    assert len(found.losses) == 30 and total_error(found.losses) > 0.5
    assert max(loss.norm for loss in found.losses) < 0.1


def test_metadata(tmp_path, base):
    network = write_network(tmp_path / "net.safetensors")
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    merge_into_checkpoint(base, [(network, 1.0)], tuned, precision="fp32")
    extract_lora(base, tuned, out, RankRule(3))
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "anima"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "3")
    assert metadata["ss_network_module"] == "networks.lora_anima"
    assert metadata["ss_new_sd_model_hash"] == sha256_file(base)
    assert metadata["modelspec.architecture"] == "anima-preview/lora"
    assert metadata["modelspec.title"] == "out" and len(metadata["sshs_model_hash"]) == 64
    told = "tuned.safetensors minus base.safetensors, rank 3"
    assert metadata["ss_training_comment"].endswith(told)


def test_files_that_cannot_be_compared(tmp_path, base):
    out = tmp_path / "out.safetensors"
    same = write_checkpoint(tmp_path / "b.safetensors", "")
    assert "nothing to extract" in refusal(base, same, out, RankRule(2))
    deep = dit_weights(dataclasses.replace(TINY, num_blocks=4))
    save_file(deep, tmp_path / "deep.safetensors")
    assert "4 blocks instead of 3" in refusal(base, tmp_path / "deep.safetensors", out, RankRule(2))
    wide = dit_weights(dataclasses.replace(TINY, mlp_hidden=96))
    save_file(wide, tmp_path / "wide.safetensors")
    text = refusal(base, tmp_path / "wide.safetensors", out, RankRule(2))
    assert "blocks.0.mlp.layer1.weight [96, 64] instead of [128, 64]" in text
    bare = write_checkpoint(tmp_path / "bare.safetensors", adapter=False)
    for pair in ((base, bare), (bare, base)):
        assert "has no LLM adapter" in refusal(*pair, out, RankRule(2), llm_adapter=True)
    network = write_network(tmp_path / "net.safetensors")
    assert "this is a LoRA" in refusal(base, network, out, RankRule(2))
    eight = load_file(base)
    eight[f"net.{Q}.weight"] = eight[f"net.{Q}.weight"].to(torch.float8_e4m3fn)
    save_file(eight, tmp_path / "eight.safetensors")
    assert "float8_e4m3fn" in refusal(base, tmp_path / "eight.safetensors", out, RankRule(2))
    bad = changed(base, tmp_path / "bad.safetensors", **{WEIGHT: float("nan")})
    assert "not finite" in refusal(base, bad, out, RankRule(2))
    assert "one of the inputs" in refusal(base, bad, bad, RankRule(2))
    assert "not a regular expression" in refusal(base, bad, out, RankRule(2), include=["["])
    assert "no layer is left" in refusal(base, bad, out, RankRule(2), exclude=[".*"])
    assert not out.exists()


def test_command(tmp_path, base):
    tuned = changed(
        base,
        tmp_path / "tuned.safetensors",
        blocks__0__self_attn__q_proj__weight=torch.full((64, 64), 0.1),
        blocks__1__self_attn__q_norm__weight=0.5,
    )
    out = tmp_path / "out.safetensors"
    words = ["extract", str(base), str(tuned), "--output", str(out)]
    result = CliRunner().invoke(app, [*words, "--rank", "2", "--to", "comfyui", "--verbose"])
    assert result.exit_code == 0, result.output
    assert "29 target layers do not differ" in result.output
    assert "not in the LoRA: 1 other tensors" in result.output and f"{Q} " in result.output
    assert f"diffusion_model.{Q}.lora_A.weight" in load_file(out)
    for more, text in (
        ([], "give --rank"),
        (["--rank", "2", "--to", "peft"], "--to peft"),
        (["--rank", "2", "--precision", "keep"], "--precision keep"),
    ):
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == 2 and text in result.output
        assert len(result.output.strip().splitlines()) == 1


@pytest.mark.slow
def test_one_block_of_real_size(tmp_path):
    """The layers of the published model: 2048 wide, 8192 in the MLP, 1024 of text."""
    config = DitConfig(2048, 1, 16, 128, 1024, 256, 8192)
    shapes = dit_shapes(config)
    base = tmp_path / "base.safetensors"
    save_file(random_weights({f"net.{k}": s for k, s in shapes.items()}, 0, torch.bfloat16), base)
    network = tmp_path / "net.safetensors"
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name in ("self_attn.q_proj", "cross_attn.v_proj", "mlp.layer1", "mlp.layer2"):
        flat = f"lora_unet_blocks_0_{name.replace('.', '_')}"
        out_size, in_size = shapes[f"blocks.0.{name}.weight"]
        lora[f"{flat}.lora_down.weight"] = torch.randn(16, in_size, generator=generator) / 50
        lora[f"{flat}.lora_up.weight"] = torch.randn(out_size, 16, generator=generator) / 50
    save_file(lora, network)
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    merge_into_checkpoint(base, [(network, 1.0)], tuned, precision="fp32")
    found = extract_lora(base, tuned, out, RankRule(16))
    assert len(found.losses) == 4 and found.same == 6
    assert total_error(found.losses) < 1e-5
    old, new = read_lora(network)[0], read_lora(out)[0]
    for name, part in new.items():
        whole = old[name].matrix()
        assert (part.matrix() - whole).norm() < 1e-5 * whole.norm(), name
