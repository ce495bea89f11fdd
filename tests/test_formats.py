"""LoRA files: names in every dialect, conversion, folding, hashes, refusals, merging."""

import dataclasses
import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path

import golden
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny_dit import TINY, TINY_ADAPTER, dit_shapes, dit_weights, make_dit, make_inputs
from torch import nn

from anima_fast.adapters import names
from anima_fast.adapters.deltas import LoRADelta
from anima_fast.adapters.formats import read_lora, write_lora
from anima_fast.adapters.lora import add_lora, merge_lora
from anima_fast.errors import UserError
from anima_fast.models.dit import AnimaDiT, load_dit
from anima_fast.models.llm_adapter import LLMAdapter
from anima_fast.tools.convert import convert_file

LAYER = "blocks.0.mlp.layer1"


def model_names(blocks):
    """Every linear layer of a DiT, an LLM adapter and a text encoder."""
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    qwen3 = Qwen3Config(num_hidden_layers=28, vocab_size=4, num_key_value_heads=1, **sizes)
    with torch.device("meta"):
        models = {
            "": AnimaDiT(dataclasses.replace(TINY, num_blocks=blocks)),
            names.ADAPTER: LLMAdapter(dataclasses.replace(TINY_ADAPTER, layers=6)),
            names.TEXT_ENCODER: Qwen3Model(qwen3),
        }
    return [
        prefix + name
        for prefix, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def make_part(rank=4, alpha=2.0, inputs=6, outputs=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator).to(dtype)
    up = torch.randn(outputs, rank, generator=generator).to(dtype)
    return LoRADelta(down, up, alpha=None if alpha is None else torch.tensor(float(alpha)))


def make_parts(layers=("blocks.0.mlp.layer1", "t_embedder.1.linear_1"), **options):
    return {name: make_part(seed=seed, **options) for seed, name in enumerate(layers)}


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def data_hash(path):
    """SHA-256 of what follows the header."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


# Names


@pytest.mark.parametrize("blocks", [28, 40])
@pytest.mark.parametrize("dialect", names.DIALECTS)
def test_every_module_name_round_trips(blocks, dialect):
    modules = model_names(blocks)
    # Sixteen a block and six around them; sixty and the output projection; seven a layer.
    assert len(modules) == 16 * blocks + 6 + 61 + 28 * 7
    theirs = {name: names.to_dialect(name, dialect) for name in modules}
    unnamed = {name for name, other in theirs.items() if other is None}
    text = {name for name in modules if name.startswith(names.TEXT_ENCODER)}
    assert unnamed == (text if dialect == "diffusers" else set())
    named = {name: other for name, other in theirs.items() if other}
    assert len(set(named.values())) == len(named)
    for name, other in named.items():
        assert names.from_dialect(other, dialect) == name
        assert names.detect_dialect([f"{other}.lora_A.weight"]) == dialect


@pytest.mark.parametrize("case", ["default", "adapter", "text_encoder", "include_extra"])
def test_golden_names(case):
    keys = golden.load_json("lora_keys")
    suffixes = {"lora_down": "lora_A", "lora_up": "lora_B"}
    for kohya, comfyui in keys["conversion"][case]["forward"].items():
        flat, _, suffix = kohya.partition(".")
        dotted = names.from_flat(flat)
        found = f"{names.comfyui_name(dotted)}.{suffix}"
        for ours, theirs in suffixes.items():
            found = found.replace(ours, theirs)
        # The reference turns underscores that belong to names into dots.
        assert (found != comfyui) == (kohya in keys["wrong_in_reference"])


@pytest.mark.parametrize(
    ("dotted", "kohya", "comfyui", "diffusers"),
    [
        (
            "blocks.27.self_attn.output_proj",
            "lora_unet_blocks_27_self_attn_output_proj",
            "diffusion_model.blocks.27.self_attn.output_proj",
            "transformer.transformer_blocks.27.attn1.to_out.0",
        ),
        (
            "blocks.3.cross_attn.k_proj",
            "lora_unet_blocks_3_cross_attn_k_proj",
            "diffusion_model.blocks.3.cross_attn.k_proj",
            "transformer.transformer_blocks.3.attn2.to_k",
        ),
        (
            "blocks.39.mlp.layer2",
            "lora_unet_blocks_39_mlp_layer2",
            "diffusion_model.blocks.39.mlp.layer2",
            "transformer.transformer_blocks.39.ff.net.2",
        ),
        (
            "t_embedder.1.linear_2",
            "lora_unet_t_embedder_1_linear_2",
            "diffusion_model.t_embedder.1.linear_2",
            "transformer.time_embed.t_embedder.linear_2",
        ),
        (
            "blocks.0.adaln_modulation_self_attn.1",
            "lora_unet_blocks_0_adaln_modulation_self_attn_1",
            "diffusion_model.blocks.0.adaln_modulation_self_attn.1",
            "transformer.transformer_blocks.0.norm1.linear_1",
        ),
        (
            "blocks.0.adaln_modulation_cross_attn.2",
            "lora_unet_blocks_0_adaln_modulation_cross_attn_2",
            "diffusion_model.blocks.0.adaln_modulation_cross_attn.2",
            "transformer.transformer_blocks.0.norm2.linear_2",
        ),
        (
            "final_layer.adaln_modulation.1",
            "lora_unet_final_layer_adaln_modulation_1",
            "diffusion_model.final_layer.adaln_modulation.1",
            "transformer.norm_out.linear_1",
        ),
        (
            "x_embedder.proj.1",
            "lora_unet_x_embedder_proj_1",
            "diffusion_model.x_embedder.proj.1",
            "transformer.patch_embed.proj",
        ),
        (
            "llm_adapter.blocks.5.mlp.2",
            "lora_unet_llm_adapter_blocks_5_mlp_2",
            "diffusion_model.llm_adapter.blocks.5.mlp.2",
            "text_conditioner.blocks.5.mlp.2",
        ),
        (
            "text_encoder.layers.27.mlp.gate_proj",
            "lora_te_layers_27_mlp_gate_proj",
            "text_encoders.qwen3_06b.transformer.model.layers.27.mlp.gate_proj",
            None,
        ),
    ],
)
def test_names_in_three_dialects(dotted, kohya, comfyui, diffusers):
    for dialect, theirs in zip(names.DIALECTS, (kohya, comfyui, diffusers), strict=True):
        assert names.to_dialect(dotted, dialect) == theirs
        assert theirs is None or names.from_dialect(theirs, dialect) == dotted


@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        ("kohya", "lora_unet_blocks_0_mlp_layer3"),
        ("kohya", "lora_unet_blocks_x_mlp_layer1"),
        ("kohya", "lora_unet_down_blocks_0_mlp_layer1"),
        ("kohya", "lora_te1_layers_0_mlp_up_proj"),
        ("comfyui", "diffusion_model.blocks.0.cross_attn.k"),
        ("comfyui", "diffusion_model.t.embedder.1.linear_1"),
        ("comfyui", "diffusion_model.blocks.0.adaln_modulation.self_attn.1"),
        ("comfyui", "diffusion_model.blocks_0_mlp_layer1"),
        ("comfyui", "diffusion_model.text_encoder.layers.0.mlp.up_proj"),
        ("diffusers", "transformer.transformer_blocks.0.attn.to_q"),
        ("diffusers", "transformer.blocks.0.mlp.layer1"),
        ("diffusers", "text_conditioner.blocks.0.mlp.1"),
    ],
)
def test_names_of_no_module_are_unknown(dialect, name):
    assert names.from_dialect(name, dialect) is None


# Conversion


@pytest.mark.parametrize(
    ("source", "target"), [("lora_kohya", "lora_comfy"), ("lora_comfy", "lora_kohya")]
)
def test_golden_conversion(tmp_path, source, target):
    expected = golden.find(f"{target}.safetensors")
    out = tmp_path / "out.safetensors"
    convert_file(golden.find(f"{source}.safetensors"), out)
    assert_same(load_file(out), load_file(expected))
    metadata = metadata_of(out)
    assert data_hash(out) == data_hash(expected) == metadata["sshs_model_hash"]
    # Of no bytes: the file ends before 1 MiB.
    assert metadata["sshs_legacy_hash"] == "e3b0c442"


def test_metadata_is_copied_and_hashes_are_made_anew(tmp_path):
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    stale = {"sshs_model_hash": "old", "sshs_legacy_hash": "old"}
    own = {"ss_tag_frequency": '{"ä": 1}', "modelspec.title": "x"}
    tensors = {
        "lora_unet_blocks_0_mlp_layer1.lora_down.weight": torch.randn(64, 4000),
        "lora_unet_blocks_0_mlp_layer1.lora_up.weight": torch.randn(4000, 64),
    }
    save_file(tensors, path, metadata={**own, **stale})
    convert_file(path, out)
    found = metadata_of(out)
    assert {k: v for k, v in found.items() if k not in stale} == own
    assert found["sshs_model_hash"] == data_hash(out)
    plain = save(load_file(out), metadata={"ss_tag_frequency": '{"ä": 1}'})
    legacy = hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]
    assert found["sshs_legacy_hash"] == legacy != "e3b0c442"


@pytest.mark.parametrize(
    ("source", "options", "written"),
    [
        ("kohya", {}, "comfyui"),
        ("comfyui", {}, "kohya"),
        ("diffusers", {}, "kohya"),
        ("comfyui", {"to": "diffusers"}, "diffusers"),
        ("kohya", {"to": "kohya"}, "kohya"),
        ("comfyui", {"to": "comfyui", "reverse": True}, "kohya"),
    ],
)
def test_dialect_written(tmp_path, source, options, written):
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write_lora(path, make_parts(), source)
    assert convert_file(path, out, **options) == written
    assert names.detect_dialect(load_file(out)) == written


def test_dotted_names_with_kohya_suffixes_are_read(tmp_path):
    part = make_part()
    name = f"diffusion_model.{LAYER}"
    tensors = {f"{name}.lora_down.weight": part.down, f"{name}.lora_up.weight": part.up}
    save_file(tensors, tmp_path / "lora.safetensors")
    found, dialect, _ = read_lora(tmp_path / "lora.safetensors")
    assert dialect == "comfyui" and torch.equal(found[LAYER].up, part.up)
    assert found[LAYER].scale == 1


# Folding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("alpha", "exact"), [(1.0, True), (4.0, True), (32.0, True), (3.0, False), (0.7, False)]
)
@pytest.mark.parametrize(
    "options", [{"to": "diffusers"}, {"fold_alpha": True}, {"to": "kohya", "fold_alpha": True}]
)
def test_folding_and_unfolding(tmp_path, dtype, alpha, exact, options):
    first, folded, last = (tmp_path / f"{i}.safetensors" for i in range(3))
    # Multiples of 1/16 stay normal numbers in float16 at every scale.
    parts = {
        name: dataclasses.replace(part, up=(part.up * 16).round() / 16)
        for name, part in make_parts(alpha=alpha, dtype=dtype).items()
    }
    write_lora(first, parts, "kohya")
    convert_file(first, folded, **options)
    assert not any(key.endswith(".alpha") for key in load_file(folded))
    for name, part in read_lora(folded)[0].items():
        assert part.scale == 1 and torch.equal(part.down, parts[name].down)
        expected = parts[name].up.double() * parts[name].scale
        torch.testing.assert_close(part.up, expected.to(dtype), rtol=0, atol=0)
    convert_file(folded, last, to="kohya")
    found, expected = load_file(last), load_file(first)
    if exact:
        assert_same(found, expected)
        assert data_hash(last) == data_hash(first)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=torch.finfo(dtype).eps * 1.01, atol=0)
    assert "anima_fast.folded_alphas" not in metadata_of(last)


def test_a_file_without_alpha_means_rank(tmp_path):
    write_lora(tmp_path / "lora.safetensors", make_parts(alpha=None), "comfyui")
    assert not any(key.endswith(".alpha") for key in load_file(tmp_path / "lora.safetensors"))
    assert {p.scale for p in read_lora(tmp_path / "lora.safetensors")[0].values()} == {1.0}


NAMES = [
    name
    for name in model_names(40)
    if not name.startswith("blocks.") or name.startswith(("blocks.0.", "blocks.39."))
]


@st.composite
def lora_parts(draw):
    """A subset of the modules, each with its own rank, alpha and sizes."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    scales = st.one_of(
        st.sampled_from([2.0**n for n in range(-6, 5)]), st.floats(0.015625, 100.0, width=32)
    )
    chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    parts = {}
    for seed, name in enumerate(chosen):
        rank = draw(st.integers(1, 9))
        parts[name] = make_part(
            rank, rank * draw(scales), draw(st.integers(1, 7)), dtype=dtype, seed=seed
        )
    return parts


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    lora_parts(), st.lists(st.sampled_from(names.DIALECTS), min_size=1, max_size=5), st.booleans()
)
def test_any_chain_of_conversions_restores_the_file(parts, chain, fold_alpha):
    if any(name.startswith(names.TEXT_ENCODER) for name in parts):
        chain = [dialect for dialect in chain if dialect != "diffusers"]
    with tempfile.TemporaryDirectory() as folder:
        first, last = Path(folder, "first.safetensors"), Path(folder, "last.safetensors")
        write_lora(first, parts, "kohya", metadata={"ss_steps": "1"})
        path = first
        for index, dialect in enumerate(chain):
            path, previous = Path(folder, f"{index}.safetensors"), path
            convert_file(previous, path, to=dialect, fold_alpha=fold_alpha)
        convert_file(path, last, to="kohya")
        folds = sum(fold_alpha or dialect == "diffusers" for dialect in chain)
        found, expected = load_file(last), load_file(first)
        assert found.keys() == expected.keys()
        for name, part in parts.items():
            flat = names.flat_name(name)
            for suffix in ("alpha", "lora_down.weight"):
                assert torch.equal(found[f"{flat}.{suffix}"], expected[f"{flat}.{suffix}"])
            up, own = found[f"{flat}.lora_up.weight"], part.up
            power = part.scale.hex().split("p")[0] == "0x1.0000000000000"
            rtol = 0 if power else 1.01 * folds * torch.finfo(own.dtype).eps
            torch.testing.assert_close(up, own, rtol=rtol, atol=0)
        assert metadata_of(last)["ss_steps"] == "1"


# Other networks


def other_network(*suffixes, module="lora_unet_blocks_0_adaln_modulation_self_attn_1"):
    generator = torch.Generator().manual_seed(1)
    shapes = {s: () if s == "alpha" else (4, 4) for s in suffixes} | {"dora_scale": (4, 1)}
    shapes = {s: shapes[s] for s in suffixes}
    return {f"{module}.{s}": torch.randn(n, generator=generator) for s, n in shapes.items()}


@pytest.mark.parametrize(
    "suffixes",
    [
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("lora_down.weight", "lora_up.weight", "dora_scale", "alpha"),
    ],
)
def test_other_networks_are_renamed_and_otherwise_identical(tmp_path, suffixes):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    tensors = other_network(*suffixes)
    save_file(tensors, tmp_path / "in.safetensors", metadata={"ss_network_args": "{}"})
    assert convert_file(tmp_path / "in.safetensors", there) == "comfyui"
    found = load_file(there)
    for key, tensor in tensors.items():
        suffix = key.partition(".")[2].replace("_down", "_A").replace("_up", "_B")
        name = f"diffusion_model.blocks.0.adaln_modulation_self_attn.1.{suffix}"
        assert torch.equal(found[name], tensor)
    assert len(found) == len(tensors)
    assert convert_file(there, back) == "kohya"
    assert_same(load_file(back), tensors)
    assert metadata_of(back)["ss_network_args"] == "{}"
    assert metadata_of(back)["sshs_model_hash"] == data_hash(back)


# Refusals


def refuse(source, folder, match, **options):
    """A conversion fails and leaves the output and its folder as they were."""
    out = folder / "out.safetensors"
    out.write_bytes(b"precious")
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=match):
        convert_file(source, out, **options)
    assert sorted(folder.iterdir()) == before and out.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "another model"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "not an Anima LoRA"),
        ("diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight", "another model"),
        ("diffusion_model.blocks.0.cross_attn.k.lora_A.weight", "another model"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "another model"),
        ("unet.up_blocks.0.attentions.0.to_q.lora_A.weight", "not an Anima LoRA"),
        ("net.blocks.0.mlp.layer1.weight", "not an Anima LoRA"),
        ("model.diffusion_model.blocks.0.mlp.layer1.weight", "not an Anima LoRA"),
    ],
)
def test_files_of_other_models_are_refused(tmp_path, key, match):
    save_file({key: torch.zeros(2, 3)}, tmp_path / "in.safetensors")
    refuse(tmp_path / "in.safetensors", tmp_path, match)
    with pytest.raises(UserError, match=match):
        read_lora(tmp_path / "in.safetensors")
    # A file that is partly Anima's is no better.
    write_lora(tmp_path / "good.safetensors", make_parts(), "kohya")
    mixed = load_file(tmp_path / "good.safetensors") | {key: torch.zeros(2, 3)}
    save_file(mixed, tmp_path / "in.safetensors")
    refuse(tmp_path / "in.safetensors", tmp_path, r"1 keys belong to no module .*another model")


@pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
def test_truncated_files_are_refused(tmp_path, kept):
    write_lora(tmp_path / "in.safetensors", make_parts(), "kohya")
    data = (tmp_path / "in.safetensors").read_bytes()
    (tmp_path / "in.safetensors").write_bytes(data[:kept])
    refuse(tmp_path / "in.safetensors", tmp_path, "cut off|safetensors")


def test_another_kind_of_file_is_named(tmp_path):
    save_file(dit_weights(), tmp_path / "in.safetensors")
    refuse(tmp_path / "in.safetensors", tmp_path, "this is an Anima DiT")


def test_missing_folders_and_empty_files_are_refused(tmp_path):
    refuse(tmp_path / "absent.safetensors", tmp_path, "does not exist")
    refuse(tmp_path, tmp_path, "is a folder")
    save_file({}, tmp_path / "in.safetensors")
    refuse(tmp_path / "in.safetensors", tmp_path, "not an Anima LoRA")


@pytest.mark.parametrize(
    "shapes",
    [
        {"lora_down": (2, 3)},
        {"lora_up": (5, 2)},
        {"lora_down": (2, 3), "lora_up": (5, 4)},
        {"lora_down": (2,), "lora_up": (5,)},
        {"lora_down": (), "lora_up": ()},
        {"lora_down": (0, 3), "lora_up": (5, 0)},
        {},
    ],
    ids=["down only", "up only", "two ranks", "vectors", "scalars", "no rank", "alpha only"],
)
def test_missing_and_unfitting_matrices_are_refused(tmp_path, shapes):
    name = "lora_unet_blocks_0_mlp_layer1"
    tensors = {f"{name}.{side}.weight": torch.zeros(shape) for side, shape in shapes.items()}
    save_file({f"{name}.alpha": torch.tensor(1.0), **tensors}, tmp_path / "in.safetensors")
    refuse(tmp_path / "in.safetensors", tmp_path, f"{LAYER} is incomplete|matrices of {LAYER}")


@pytest.mark.parametrize(
    "suffixes",
    [("hada_w1_a", "hada_w1_b", "hada_w2_a"), ("lokr_w2",), ("lokr_w1", "lokr_w2_a"), ("alpha",)],
)
def test_incomplete_modules_of_other_networks_are_refused(tmp_path, suffixes):
    save_file(other_network(*suffixes), tmp_path / "in.safetensors")
    refuse(tmp_path / "in.safetensors", tmp_path, "is incomplete")


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    write_lora(tmp_path / "in.safetensors", make_parts(), "kohya")
    tensors = load_file(tmp_path / "in.safetensors")
    tensors["lora_unet_blocks_0_mlp_layer1.alpha"] = torch.ones(2)
    save_file(tensors, tmp_path / "in.safetensors")
    refuse(tmp_path / "in.safetensors", tmp_path, "not one number")


@pytest.mark.parametrize("text", ["{", "[]", '{"blocks.0.mlp.layer1": "x"}'])
def test_damaged_folding_metadata_is_refused(tmp_path, text):
    write_lora(tmp_path / "lora.safetensors", make_parts(), "comfyui", fold_alpha=True)
    tensors = load_file(tmp_path / "lora.safetensors")
    save_file(tensors, tmp_path / "in.safetensors", metadata={"anima_fast.folded_alphas": text})
    refuse(tmp_path / "in.safetensors", tmp_path, "is damaged", to="kohya")


@pytest.mark.parametrize("alpha", [torch.tensor(2.0, dtype=torch.bfloat16), None])
def test_alphas_come_back_as_they_were(tmp_path, alpha):
    """Half-precision alphas keep their dtype, and none is made up where there was none."""
    part = dataclasses.replace(make_part(rank=4, dtype=torch.bfloat16), alpha=alpha)
    first, there, back = (tmp_path / f"{name}.safetensors" for name in "abc")
    write_lora(first, {LAYER: part}, "kohya")
    convert_file(first, there, to="diffusers")
    convert_file(there, back, to="kohya")
    assert_same(load_file(back), load_file(first))


def test_the_input_as_output_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    write_lora(path, make_parts(), "kohya")
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    os.symlink(path, tmp_path / "link.safetensors")
    for same in (path, "lora.safetensors", tmp_path / "x" / ".." / path.name, "link.safetensors"):
        with pytest.raises(UserError, match="is one of the inputs"):
            convert_file(path, same)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_an_unknown_dialect_is_refused(tmp_path, kind):
    write_lora(tmp_path / "lora.safetensors", make_parts(), "kohya")
    loha = other_network("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    save_file(loha, tmp_path / "loha.safetensors")
    refuse(tmp_path / f"{kind}.safetensors", tmp_path, "kohya, comfyui", to="a1111")


@pytest.mark.parametrize(
    "suffixes", [("lokr_w1", "lokr_w2"), ("lora_down.weight", "lora_up.weight", "dora_scale")]
)
def test_what_diffusers_does_not_load_is_refused(tmp_path, suffixes):
    save_file(other_network(*suffixes), tmp_path / "in.safetensors")
    refuse(tmp_path / "in.safetensors", tmp_path, "diffusers loads plain LoRA only", to="diffusers")


def test_a_text_encoder_has_no_name_in_diffusers(tmp_path):
    parts = make_parts([LAYER, "text_encoder.layers.0.mlp.up_proj"])
    write_lora(tmp_path / "in.safetensors", parts, "kohya")
    refuse(tmp_path / "in.safetensors", tmp_path, "no name in the diffusers", to="diffusers")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["down", "up", "alpha"])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, value, side):
    part = make_part()
    getattr(part, side).view(-1)[0] = value
    for dialect in names.DIALECTS:
        with pytest.raises(UserError, match="not finite"):
            write_lora(tmp_path / "out.safetensors", {LAYER: part}, dialect)
    assert not list(tmp_path.iterdir())


# Merging


def random_lora(path, dialect="kohya", config=TINY, **options):
    """A LoRA file with random values for a DiT; returns its parts."""
    network = add_lora(make_dit(config), **{"rank": 4, "alpha": 3.0, "seed": 1} | options)
    generator = torch.Generator().manual_seed(7)
    network.flat.copy_(0.2 * torch.randn(network.flat.shape, generator=generator))
    network.save(path, dialect)
    return network.deltas()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dialect", "multiplier"), [("kohya", 1.0), ("diffusers", -0.5)])
def test_merging_adds_the_delta(tmp_path, dtype, dialect, multiplier):
    path, dit = tmp_path / "lora.safetensors", make_dit(dtype=dtype)
    parts = random_lora(path, dialect, include_patterns=[".*_embedder.*"])
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    merge_lora(dit, path, multiplier)
    for name, tensor in dit.state_dict().items():
        part = parts.get(name.removesuffix(".weight"))
        delta = multiplier * 0.75 * part.up @ part.down if part else 0
        expected = (before[name].float() + delta).to(dtype)
        eps = torch.finfo(dtype).eps if part else 0
        torch.testing.assert_close(tensor, expected, atol=4 * eps, rtol=eps)
        assert tensor.dtype == dtype


def test_a_merged_dit_computes_as_one_with_the_network(tmp_path):
    path, merged, dit = tmp_path / "lora.safetensors", make_dit(), make_dit()
    random_lora(path)
    merge_lora(merged, path, 0.7)
    network = add_lora(dit, modules_from=read_lora(path)[0])
    network.load(path)
    network.multiplier = 0.7
    torch.testing.assert_close(merged(*make_inputs()), dit(*make_inputs()), atol=1e-5, rtol=1e-4)


def test_merging_leaves_the_tensors_it_was_loaded_from(tmp_path):
    random_lora(tmp_path / "lora.safetensors")
    weights = dit_weights()
    dit = load_dit(weights, dtype=torch.float32)
    merge_lora(dit, tmp_path / "lora.safetensors")
    assert_same(weights, dit_weights())


def test_merging_passes_over_what_is_not_the_dit(tmp_path):
    parts = random_lora(tmp_path / "dit.safetensors")
    others = make_parts(["llm_adapter.blocks.0.mlp.0", "text_encoder.layers.0.mlp.up_proj"])
    write_lora(tmp_path / "all.safetensors", parts | others, "kohya")
    found, expected = make_dit(), make_dit()
    merge_lora(found, tmp_path / "all.safetensors")
    merge_lora(expected, tmp_path / "dit.safetensors")
    assert_same(found.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    "changes",
    [{"num_blocks": 4}, {"context_dim": 32}, {"mlp_hidden": 160}],
    ids=["more blocks", "wider text", "wider mlp"],
)
def test_a_refused_merge_changes_nothing(tmp_path, changes):
    config = dataclasses.replace(TINY, **changes)
    assert dit_shapes(config) != dit_shapes()
    random_lora(tmp_path / "lora.safetensors", config=config)
    dit = make_dit()
    with pytest.raises(UserError, match="does not fit this DiT"):
        merge_lora(dit, tmp_path / "lora.safetensors")
    assert_same(dit.state_dict(), dit_weights())


def test_folded_alphas_are_recorded_by_module(tmp_path):
    parts = make_parts(alpha=3.0)
    write_lora(tmp_path / "lora.safetensors", parts, "diffusers", metadata={"ss_steps": "1"})
    recorded = json.loads(metadata_of(tmp_path / "lora.safetensors")["anima_fast.folded_alphas"])
    assert recorded == dict.fromkeys(parts, 3.0)
