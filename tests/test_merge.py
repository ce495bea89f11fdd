"""Merging networks into checkpoints, and networks with each other."""

import json

import pytest
import torch
from finished import KINDS, checkpoint_tensors, write_checkpoint, write_network
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_dit import make_dit, make_inputs, relative_error
from typer.testing import CliRunner

from anima_fast.adapters.deltas import adapted_weight
from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.lora import add_lora
from anima_fast.cli import app
from anima_fast.demo.tiny_stack import random_weights
from anima_fast.errors import UserError
from anima_fast.models.checkpoint import DIT_PREFIXES
from anima_fast.models.dit import load_dit
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.options.words import path_and_weight
from anima_fast.tools.combine import combine_networks
from anima_fast.tools.merge import merge_into_checkpoint
from anima_fast.tools.ranks import RankRule, total_error

Q = "blocks.0.self_attn.q_proj"


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def offsets(path):
    """Names in the order of their data."""
    with safe_open(path, framework="pt") as file:
        return list(file.offset_keys())


def live(networks):
    """The velocity of the tiny DiT with networks on its layers, in float32."""
    dit = make_dit()
    for path, strength in networks:
        network = add_lora(dit, modules_from=read_lora(path)[0])
        network.load(path)
        network.multiplier = strength
        network.eval()
    return dit(*make_inputs()).detach()


def refusal(*args, **options):
    with pytest.raises(UserError) as error:
        merge_into_checkpoint(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base.safetensors")


# Into a checkpoint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [None, "outputs", "inputs"])
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_a_merged_dit_computes_as_one_with_the_network(tmp_path, base, kind, dora, strength):
    network = write_network(tmp_path / "net.safetensors", kind=kind, dora=dora)
    out = tmp_path / "out.safetensors"
    done = merge_into_checkpoint(base, [(network, strength)], out, precision="fp32")
    assert done == [f"{network} at {strength:g}: 30 modules", f"wrote {out}: 30 weights changed"]
    found = load_dit(out, dtype=torch.float32)(*make_inputs())
    expected = live([(network, strength)])
    assert relative_error(found, expected) < 1e-5
    assert relative_error(make_dit()(*make_inputs()), expected) > 1e-3


def test_several_networks_of_every_kind_in_one_go(tmp_path, base):
    networks = [
        (write_network(tmp_path / "a.safetensors", seed=1, dialect="comfyui"), 0.8),
        (write_network(tmp_path / "b.safetensors", seed=2, kind="lokr", blocks=[1]), -0.5),
        (write_network(tmp_path / "c.safetensors", seed=3, dora="outputs"), 0.6),
        (write_network(tmp_path / "d.safetensors", seed=4, kind="loha", dora="inputs"), 1.2),
    ]
    out = tmp_path / "out.safetensors"
    done = merge_into_checkpoint(base, networks, out, precision="fp32")
    assert [line.split(": ")[1] for line in done] == [
        "30 modules", "10 modules", "30 modules", "30 modules", "30 weights changed"
    ]  # fmt: skip
    found = load_dit(out, dtype=torch.float32)(*make_inputs())
    assert relative_error(found, live(networks)) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "keep"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_one_rounding_of_a_float32_sum(tmp_path, precision, stored):
    base = write_checkpoint(tmp_path / "base.safetensors", dtype=stored)
    networks = [(write_network(tmp_path / f"{i}.safetensors", seed=i), 0.3 + i) for i in range(3)]
    out = tmp_path / "out.safetensors"
    merge_into_checkpoint(base, networks, out, precision=precision)
    old, new = load_file(base), load_file(out)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = dtypes.get(precision, stored)
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    weight = old[f"net.{Q}.weight"]
    for path, strength in networks:
        weight = adapted_weight(weight, read_lora(path)[0][Q], strength)
    assert torch.equal(new[f"net.{Q}.weight"], weight.to(dtype))
    for key in ("net.t_embedding_norm.weight", "net.llm_adapter.out_proj.bias"):
        assert torch.equal(new[key], old[key].to(dtype))


def test_bf16_is_the_default(tmp_path, base):
    network = write_network(tmp_path / "net.safetensors")
    out = tmp_path / "out.safetensors"
    merge_into_checkpoint(base, [(network, 1.0)], out)
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix", DIT_PREFIXES)
def test_names_prefix_order_and_metadata_stay(tmp_path, prefix):
    more = {
        f"{prefix}pos_embedder.seq": torch.arange(4.0),
        f"{prefix}accum_video_sample_counter": torch.tensor(7),
    }
    told = {"modelspec.author": "me", "sshs_model_hash": "0" * 64, "format": "pt"}
    base = write_checkpoint(tmp_path / "base.safetensors", prefix, more=more, metadata=told)
    network = write_network(tmp_path / "net.safetensors", metadata={"ss_seed": "1"})
    out = tmp_path / "out.safetensors"
    merge_into_checkpoint(base, [(network, 0.25)], out, precision="keep")
    old, new = load_file(base), load_file(out)
    assert offsets(out) == offsets(base) and old.keys() == new.keys()
    assert all(torch.equal(new[key], tensor) for key, tensor in more.items())
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {f"{prefix}{name}.weight" for name in read_lora(network)[0]}
    found = metadata_of(out)
    assert found["modelspec.author"] == "me" and found["format"] == "pt"
    # What no longer holds is gone, what was merged is told.
    assert "sshs_model_hash" not in found
    assert found["modelspec.merged_from"] == "base, net"
    assert found["modelspec.architecture"] == "anima-preview"
    (entry,) = json.loads(found["anima_fast.merged_networks"])
    hashed = metadata_of(network)["sshs_model_hash"]
    assert entry == {
        "file": "net.safetensors", "weight": 0.25, "network": "LoRA", "sshs_model_hash": hashed
    }  # fmt: skip
    again = tmp_path / "again.safetensors"
    merge_into_checkpoint(out, [(network, -0.25)], again, precision="keep")
    told = json.loads(metadata_of(again)["anima_fast.merged_networks"])
    assert [entry["weight"] for entry in told] == [0.25, -0.25]


def test_all_in_one_files_keep_their_other_models(tmp_path):
    qwen = "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn."
    more = {
        "first_stage_model.encoder.conv1.weight": torch.ones(2, 2, dtype=torch.float16),
        "text_encoders.qwen3_06b.transformer.model.embed_tokens.weight": torch.ones(4, 8),
        f"{qwen}q_norm.weight": torch.ones(8),
        f"{qwen}q_proj.weight": torch.ones(8, 8),
        "scale": torch.tensor(3.0),
    }
    base = write_checkpoint(tmp_path / "base.safetensors", "model.diffusion_model.", more=more)
    tensors = {
        "lora_te_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(2, 8),
        "lora_te_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(8, 2),
    }
    save_file(tensors, tmp_path / "te.safetensors")
    networks = [(tmp_path / "te.safetensors", 0.5), (write_network(tmp_path / "n.safetensors"), 1)]
    out = tmp_path / "out.safetensors"
    done = merge_into_checkpoint(base, networks, out)
    assert [line.split(": ")[1] for line in done[:-1]] == ["1 modules", "30 modules"]
    new = load_file(out)
    merged = new.pop(f"{qwen}q_proj.weight")
    assert torch.equal(merged, torch.full((8, 8), 2.0))
    for key in more.keys() & new.keys():
        assert torch.equal(new[key], more[key]) and new[key].dtype == more[key].dtype, key
    assert new[f"model.diffusion_model.{Q}.weight"].dtype == torch.bfloat16


def test_the_llm_adapter_is_merged_where_it_is(tmp_path, base):
    network = write_network(tmp_path / "net.safetensors", adapter=True)
    out = tmp_path / "out.safetensors"
    done = merge_into_checkpoint(base, [(network, 1.0)], out, precision="fp32")
    assert done[1:] == [f"wrote {out}: 50 weights changed"]
    name = "llm_adapter.blocks.1.mlp.2"
    expected = adapted_weight(load_file(base)[f"net.{name}.weight"], read_lora(network)[0][name])
    adapter = load_llm_adapter(out, dtype=torch.float32)
    assert torch.equal(adapter.blocks[1].mlp[2].weight, expected)

    # A DiT without it takes the rest and says so; its own file takes the other part.
    bare = write_checkpoint(tmp_path / "bare.safetensors", adapter=False)
    done = merge_into_checkpoint(bare, [(network, 1.0)], out, precision="fp32")
    assert done[0].endswith(": 30 modules")
    assert "note: net.safetensors: 20 modules of the LLM adapter are not merged" in done[1]
    own = {
        key.removeprefix("net."): tensor
        for key, tensor in checkpoint_tensors().items()
        if "llm_adapter" in key
    }
    save_file(own, tmp_path / "adapter.safetensors")
    done = merge_into_checkpoint(
        tmp_path / "adapter.safetensors", [(network, 1.0)], out, precision="fp32"
    )
    assert done[0].endswith(": 20 modules")
    assert "30 modules of the DiT are not merged" in done[1]
    assert torch.equal(load_file(out)[f"{name}.weight"], expected)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_text_encoder_file(tmp_path, prefix, base):
    layer = "layers.1.mlp.up_proj"
    shapes = {"embed_tokens.weight": (5, 8), f"{layer}.weight": (16, 8)}
    shapes |= {f"layers.{i}.self_attn.q_norm.weight": (8,) for i in (0, 1)}
    tensors = random_weights({prefix + name: shape for name, shape in shapes.items()}, 0)
    save_file(tensors, tmp_path / "qwen.safetensors")
    flat = f"lora_te_{layer.replace('.', '_')}"
    lora = {
        f"{flat}.lora_down.weight": torch.ones(2, 8),
        f"{flat}.lora_up.weight": torch.ones(16, 2),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    networks = [(tmp_path / "lora.safetensors", 0.25)]
    done = merge_into_checkpoint(tmp_path / "qwen.safetensors", networks, out, precision="keep")
    assert done[-1] == f"wrote {out}: 1 weights changed"
    new = load_file(out)
    for key, tensor in tensors.items():
        more = 0.5 if layer in key else 0
        assert torch.equal(new[key], tensor + more)
    assert not any(key.startswith("modelspec.") for key in metadata_of(out))
    assert "is for the text encoder, which" in refusal(base, networks, out)


def test_weight_zero_changes_nothing(tmp_path, base):
    networks = [(write_network(tmp_path / "n.safetensors", dora="outputs"), 0.0)]
    out = tmp_path / "out.safetensors"
    merge_into_checkpoint(base, networks, out, precision="keep")
    old, new = load_file(base), load_file(out)
    assert all(torch.equal(new[key], tensor) for key, tensor in old.items())


def test_a_deeper_network_is_sent_to_remap(tmp_path, base):
    tensors = load_file(write_network(tmp_path / "n.safetensors"))
    moved = {key.replace("blocks_2_", "blocks_20_"): tensor for key, tensor in tensors.items()}
    save_file(moved, tmp_path / "deep.safetensors")
    text = refusal(base, [(tmp_path / "deep.safetensors", 1.0)], tmp_path / "out.safetensors")
    assert "has 3 blocks" in text and "remap" in text


def test_a_network_of_another_width_is_refused(tmp_path, base):
    key = "lora_unet_blocks_0_self_attn_q_proj"
    lora = {
        f"{key}.lora_down.weight": torch.ones(2, 32),
        f"{key}.lora_up.weight": torch.ones(64, 2),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    assert "[64, 32]" in refusal(base, [(tmp_path / "lora.safetensors", 1.0)], out)
    assert not out.exists()


def quantised_files():
    weights = checkpoint_tensors()
    key = f"net.{Q}.weight"
    yield weights | {key: weights[key].to(torch.float8_e4m3fn)}, "float8_e4m3fn"
    yield weights | {key: (100 * weights[key]).to(torch.int8)}, "int8"
    yield weights | {f"net.{Q}.scale_weight": torch.tensor(1.0)}, "is quantised"
    yield weights | {"scaled_fp8": torch.zeros(2)}, "is quantised"
    yield weights | {f"{key}.absmax": torch.ones(2)}, "is quantised"


def test_quantised_checkpoints_are_refused(tmp_path):
    network = write_network(tmp_path / "n.safetensors")
    for tensors, text in quantised_files():
        save_file(tensors, tmp_path / "base.safetensors")
        out = tmp_path / "out.safetensors"
        assert text in refusal(tmp_path / "base.safetensors", [(network, 1.0)], out)
        assert not out.exists()


def test_what_does_not_fit_the_dtype_leaves_the_old_file(tmp_path, base):
    network = write_network(tmp_path / "n.safetensors", size=100.0)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    text = refusal(base, [(network, 1e6)], out, precision="fp16")
    assert "not finite in float16" in text
    assert out.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 3


def test_wrong_files_and_outputs(tmp_path, base):
    network = write_network(tmp_path / "n.safetensors")
    out = tmp_path / "out.safetensors"
    assert "one of the inputs" in refusal(base, [(network, 1.0)], base)
    assert "one of the inputs" in refusal(base, [(network, 1.0)], network)
    assert "must end with .safetensors" in refusal(base, [(network, 1.0)], tmp_path / "a.ckpt")
    (tmp_path / "d.safetensors").mkdir()
    assert "is a folder" in refusal(base, [(network, 1.0)], tmp_path / "d.safetensors")
    assert "this is a LoRA" in refusal(network, [(network, 1.0)], out)
    assert "this is an Anima DiT" in refusal(base, [(base, 1.0)], out)
    assert "does not exist" in refusal(tmp_path / "no.safetensors", [(network, 1.0)], out)
    assert "--precision fp8" in refusal(base, [(network, 1.0)], out, precision="fp8")
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, base):
    network = write_network(tmp_path / "n.safetensors")
    (tmp_path / "file").write_bytes(b"")
    said = []
    text = refusal(base, [(network, 1.0)], tmp_path / "file" / "out.safetensors", say=said.append)
    assert "a part of it is a file" in text and not said


def test_what_a_kill_left_is_deleted_by_the_next_run(tmp_path, base):
    network = write_network(tmp_path / "n.safetensors")
    half = tmp_path / ".out.safetensors.0b4a7fe0.tmp"
    other = tmp_path / ".my.out.safetensors.0b4a7fe0.tmp"
    half.write_bytes(b"half")
    other.write_bytes(b"half")
    merge_into_checkpoint(base, [(network, 1.0)], tmp_path / "out.safetensors")
    assert not half.exists() and other.exists()


# Networks with each other


def delta_sum(networks, name):
    return sum(strength * read_lora(path)[0][name].matrix().double() for path, strength in networks)


def test_lora_side_by_side_is_their_sum(tmp_path):
    networks = [
        (write_network(tmp_path / "a.safetensors", seed=1, dialect="comfyui"), 0.8),
        (write_network(tmp_path / "b.safetensors", seed=2, rank=3, alpha=1, blocks=[0, 2]), -0.5),
    ]
    out = tmp_path / "out.safetensors"
    losses = combine_networks(networks, out)
    assert total_error(losses) < 1e-6
    parts, dialect, metadata = read_lora(out)
    assert dialect == "comfyui" and len(parts) == 30
    assert (parts[Q].rank, parts["blocks.1.mlp.layer1"].rank) == (7, 4)
    assert all(part.alpha.item() == part.rank for part in parts.values())
    torch.testing.assert_close(parts[Q].matrix().double(), delta_sum(networks, Q))
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["modelspec.merged_from"] == "a, b"
    assert len(metadata["sshs_model_hash"]) == 64
    merged = live([(out, 1.0)])
    assert relative_error(merged, live(networks)) < 1e-5


def test_powers_of_two_are_exact_in_half_precision(tmp_path):
    networks = [
        (write_network(tmp_path / f"{i}.safetensors", seed=i, dtype=torch.bfloat16), 0.5)
        for i in (1, 2)
    ]
    out = tmp_path / "out.safetensors"
    assert total_error(combine_networks(networks, out)) < 1e-7
    part = read_lora(out)[0][Q]
    assert part.up.dtype == torch.bfloat16
    # alpha / rank = 1/2, so every number is an old one times 1/4.
    old = [read_lora(path)[0][Q] for path, _ in networks]
    assert torch.equal(part.up, torch.cat([own.up / 4 for own in old], 1))
    assert torch.equal(part.down, torch.cat([own.down for own in old]))


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "loha"), ("lokr", "loha")])
def test_the_closest_of_a_rank(tmp_path, kinds):
    networks = [
        (write_network(tmp_path / f"{i}.safetensors", seed=i, kind=kind), 0.5 + i)
        for i, kind in enumerate(kinds)
    ]
    out = tmp_path / "out.safetensors"
    losses = {loss.name: loss for loss in combine_networks(networks, out, rule=RankRule(3))}
    parts = read_lora(out)[0]
    assert {part.rank for part in parts.values()} == {3}
    whole = delta_sum(networks, Q)
    best = torch.linalg.svdvals(whole)[3:].norm().item()
    lost = (parts[Q].matrix().double() - whole).norm().item()
    assert lost == pytest.approx(best, rel=1e-4)
    assert (losses[Q].lost, losses[Q].norm) == pytest.approx((lost, whole.norm().item()), rel=1e-4)


def test_a_rank_that_holds_everything_changes_nothing(tmp_path):
    networks = [(write_network(tmp_path / "a.safetensors"), 1.0)]
    combine_networks(networks, tmp_path / "b.safetensors")
    combine_networks(networks, tmp_path / "c.safetensors", rule=RankRule(4))
    found = [load_file(tmp_path / f"{name}.safetensors") for name in "bc"]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_networks_that_have_no_sum(tmp_path):
    lora = write_network(tmp_path / "a.safetensors")
    other = write_network(tmp_path / "b.safetensors", kind="lokr")
    dora = write_network(tmp_path / "c.safetensors", dora="outputs")
    key = "lora_unet_blocks_0_self_attn_q_proj"
    wide = {
        f"{key}.lora_down.weight": torch.ones(2, 32),
        f"{key}.lora_up.weight": torch.ones(64, 2),
    }
    save_file(wide, tmp_path / "d.safetensors")
    out = tmp_path / "out.safetensors"
    for second, text in (
        (other, "is a LoKr.*give --rank"),
        (dora, "is a DoRA"),
        (tmp_path / "d.safetensors", "do not fit each other"),
    ):
        with pytest.raises(UserError, match=text):
            combine_networks([(lora, 1.0), (second, 1.0)], out)
    with pytest.raises(UserError, match="one of the inputs"):
        combine_networks([(lora, 1.0)], lora)
    assert not out.exists()


# The command


def run(*words):
    result = CliRunner().invoke(app, ["merge", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_command(tmp_path, base):
    lora = write_network(tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    result = run(base, "--lora", f"{lora}:0.5", "--lora", lora, "--output", out)
    assert result.exit_code == 0, result.output
    assert f"{lora} at 0.5: 30 modules" in result.output and "30 weights changed" in result.output
    both = tmp_path / "both.safetensors"
    result = run("--lora", f"{lora}:0.5", "--lora", lora, "--rank", 2, "--output", both)
    assert result.exit_code == 0 and "error of the whole: " in result.output
    assert read_lora(both)[0][Q].rank == 2
    for words, text in (
        ((base, "--output", out), "at least one --lora"),
        ((base, "--lora", lora), "--output is required"),
        ((base, "--lora", f"{lora}:x", "--output", out), "'x' is no number"),
        ((base, "--lora", f"{lora}:nan", "--output", out), "finite number"),
        ((base, "--lora", lora, "--rank", 4, "--output", out), "merging networks with each other"),
        (("--lora", lora, "--rank", 0, "--output", out), "at least 1"),
        (
            ("--lora", lora, "--output", both, "--device", "abc"),
            "--device abc is unknown to PyTorch",
        ),
    ):
        result = run(*words)
        assert result.exit_code == 2 and text in result.output, result.output
        assert len(result.output.strip().splitlines()) == 1


def test_weights_in_words(tmp_path):
    (tmp_path / "a:1").touch()
    for text, expected in (
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:-0.5", ("a.safetensors", -0.5)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:2", (r"C:\loras\a.safetensors", 2.0)),
        (str(tmp_path / "a:1"), (str(tmp_path / "a:1"), 1.0)),
    ):
        assert path_and_weight(text) == expected
