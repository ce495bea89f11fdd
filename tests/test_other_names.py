"""Files of other trainers: LyCORIS' wrapper, PEFT, ai-toolkit, diffusion-pipe; what conversion
keeps of LoHa, LoKr and DoRA."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_fast.adapters import names
from anima_fast.adapters.deltas import adapted_weight
from anima_fast.adapters.formats import read_lora
from anima_fast.errors import UserError
from anima_fast.tools.convert import convert_file

Q = "blocks.0.self_attn.q_proj"


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 3


KINDS = {
    "lora": {"lora_down.weight": rand(4, 64), "lora_up.weight": rand(64, 4)},
    "loha": {
        "hada_w1_a": rand(64, 2), "hada_w1_b": rand(2, 64, seed=1),
        "hada_w2_a": rand(64, 2, seed=2), "hada_w2_b": rand(2, 64, seed=3),
    },
    "lokr": {"lokr_w1": rand(8, 8), "lokr_w2_a": rand(8, 2), "lokr_w2_b": rand(2, 8)},
    "lokr, both factored": {
        "lokr_w1_a": rand(8, 1), "lokr_w1_b": rand(1, 8),
        "lokr_w2_a": rand(8, 2), "lokr_w2_b": rand(2, 8),
    },
    "lokr, both whole": {"lokr_w1": rand(8, 8), "lokr_w2": rand(8, 8, seed=5)},
    "dora": {
        "lora_down.weight": rand(4, 64), "lora_up.weight": rand(64, 4),
        "dora_scale": 1 + rand(64, 1).abs(),
    },
    "lokr with magnitudes of the inputs": {
        "lokr_w1": rand(8, 8), "lokr_w2_a": rand(8, 2), "lokr_w2_b": rand(2, 8),
        "dora_scale": 1 + rand(1, 64).abs(),
    },
}  # fmt: skip


def write(path, module, tensors, alpha=None):
    tensors = {f"{module}.{suffix}": tensor.clone() for suffix, tensor in tensors.items()}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def change(path):
    """What a file adds to a weight."""
    weight = rand(64, 64, seed=9)
    (part,) = read_lora(path)[0].values()
    return adapted_weight(weight, part) - weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold_alpha", [False, True])
@pytest.mark.parametrize("alpha", [None, 1.0, 3.0])
def test_conversion_keeps_what_a_network_does(tmp_path, kind, fold_alpha, alpha):
    source = write(tmp_path / "a.safetensors", names.flat_name(Q), KINDS[kind], alpha)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    convert_file(source, there, fold_alpha=fold_alpha)
    expected = change(source)
    assert expected.norm() > 0.01
    torch.testing.assert_close(change(there), expected, rtol=1e-4, atol=1e-6)
    has_alpha = f"diffusion_model.{Q}.alpha" in load_file(there)
    assert has_alpha == (alpha is not None and not fold_alpha)
    convert_file(there, back)
    old, new = load_file(source), load_file(back)
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        torch.testing.assert_close(new[key], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "module",
    [
        "lycoris_blocks_0_self_attn_q_proj",
        "lycoris_transformer_blocks_0_attn1_to_q",
        f"base_model.model.{Q}",
        f"base_model.model.diffusion_model.{Q}",
        "base_model.model.transformer.transformer_blocks.0.attn1.to_q",
        f"transformer.{Q}",
        f"net.{Q}",
        Q,
    ],
)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora"])
def test_names_that_image_programs_do_not_read(tmp_path, module, kind):
    source = write(tmp_path / "a.safetensors", module, KINDS[kind], 2.0)
    parts, dialect, _ = read_lora(source)
    assert (list(parts), dialect) == ([Q], names.OTHER)
    assert convert_file(source, tmp_path / "b.safetensors") == "kohya"
    expected = write(tmp_path / "c.safetensors", names.flat_name(Q), KINDS[kind], 2.0)
    found, expected = load_file(tmp_path / "b.safetensors"), load_file(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    "flat",
    ["blocks_3_adaln_modulation_cross_attn_2", "t_embedder_1_linear_1", "final_layer_linear"],
)
def test_flat_names_of_every_layer(flat):
    dotted = names.from_flat(f"lora_unet_{flat}")
    assert names.from_other(f"lycoris_{flat}") == dotted
    theirs = names.diffusers_name(dotted).removeprefix("transformer.").replace(".", "_")
    assert names.from_other(f"lycoris_{theirs}") == dotted


def test_peft_with_dora(tmp_path):
    """PEFT names the adapter in its keys while it trains, and keeps magnitudes as a vector."""
    scale = 1 + rand(64).abs()
    lora = KINDS["lora"]
    save_file(
        {
            f"base_model.model.{Q}.lora_A.default.weight": lora["lora_down.weight"],
            f"base_model.model.{Q}.lora_B.default.weight": lora["lora_up.weight"],
            f"base_model.model.{Q}.lora_magnitude_vector.default.weight": scale,
        },
        tmp_path / "a.safetensors",
    )
    part = read_lora(tmp_path / "a.safetensors")[0][Q]
    assert part.title == "DoRA" and part.alpha is None
    assert torch.equal(part.dora_scale, scale[:, None])
    assert torch.equal(part.up, lora["lora_up.weight"])


@pytest.mark.parametrize(
    "module", ["lycoris_single_transformer_blocks_0_attn_to_q", "base_model.model.conv_in"]
)
def test_other_models_are_refused(tmp_path, module):
    source = write(tmp_path / "a.safetensors", module, KINDS["lora"])
    with pytest.raises(UserError, match="belong to no module of Anima"):
        read_lora(source)


def test_a_checkpoint_is_no_network(tmp_path):
    save_file({f"net.{Q}.weight": rand(64, 64)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is not an Anima LoRA"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["lokr", "lokr, both whole"])
def test_ai_toolkit_lokr(tmp_path, kind):
    """ai-toolkit writes ComfyUI's names and, for whole factors, a huge alpha that has no effect."""
    alpha = 1e10 if "whole" in kind else 2.0
    source = write(tmp_path / "a.safetensors", f"diffusion_model.{Q}", KINDS[kind], alpha)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    assert convert_file(source, there) == "kohya"
    assert convert_file(there, back) == "comfyui"
    old, new = load_file(source), load_file(back)
    assert old.keys() == new.keys() and all(torch.equal(new[k], t) for k, t in old.items())
    assert torch.equal(change(there), change(source)) and change(source).norm() > 0.01


def test_diffusion_pipe_lora_has_no_alpha_on_the_way(tmp_path):
    lora = {"lora_A.weight": rand(4, 64), "lora_B.weight": rand(64, 4)}
    source = write(tmp_path / "a.safetensors", f"diffusion_model.{Q}", lora)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    convert_file(source, there)
    assert load_file(there).keys() == {
        f"{names.flat_name(Q)}.{s}" for s in ("lora_down.weight", "lora_up.weight")
    }
    convert_file(there, back)
    assert source.read_bytes() != there.read_bytes()
    old, new = load_file(source), load_file(back)
    assert old.keys() == new.keys() and all(torch.equal(new[k], t) for k, t in old.items())
