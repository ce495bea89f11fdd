"""`anima-fast inspect`: every kind of file, what it says about programs, and damaged files."""

import contextlib
import json
import pickle
import shutil
import struct
import sys
from math import prod

import golden
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stack import make_world, train_options
from tiny_dit import TINY_ADAPTER, adapter_weights, dit_weights
from typer.testing import CliRunner

from anima_fast.adapters.formats import read_lora
from anima_fast.cli import app
from anima_fast.data.legacy_cache import read_text
from anima_fast.errors import UserError
from anima_fast.inspection.description import inspection_text
from anima_fast.inspection.file import inspect_file
from anima_fast.models.dit import load_dit
from anima_fast.tools.convert import convert_file
from anima_fast.training.loop import train

KEYS = {"file", "kind", "title", "facts", "option", "programs", "metadata", "notes"}
Q = "lora_unet_blocks_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A stack, and what a run on it leaves: LoRA, resume state, caches."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANIMA_FAST_HOME", str(folder / "home"))
        caches = ("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk")
        options = {"save_state": True, "max_train_epochs": 1} | dict.fromkeys(caches, True)
        train(train_options(make_world(folder), folder / "out", **options))
    return folder


def look(path):
    """`inspect_file`, checked to be JSON with all its parts and to render within 80 columns."""
    found = inspect_file(path)
    assert found.keys() == KEYS
    assert json.loads(json.dumps(found)) == found
    for width in (60, 80):
        for line in inspection_text(found, width).splitlines():
            # Only a word that is longer than its column, such as a path or a hash, may stand out.
            assert len(line) <= width or " " not in line.strip()[30:], line
    return found


def refusal(path):
    with pytest.raises(UserError) as error:
        inspect_file(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def lora_file(path, metadata=None, modules=(Q,), **tensors):
    """A LoRA file with the same tensors in every module, `__` standing for a dot."""
    named = {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({f"{m}.{k}": v.clone() for m in modules for k, v in named.items()}, path, metadata)
    return path


def sparse_file(path, shapes, prefix="", dtype="BF16", size=2):
    """A safetensors file whose data is a hole: of full size, and written at once."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + size * prod(shape)
        header[prefix + name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


# Models


def test_dit(world):
    found = look(world / "models" / "dit.safetensors")
    assert found["kind"] == "dit" and found["notes"] == []
    facts = found["facts"]
    assert (facts["blocks"], facts["width"], facts["heads"]) == (2, 64, "2 of 32")
    assert (facts["context_width"], facts["prefix"], facts["dtype"]) == (32, "net.", "bfloat16")
    assert facts["llm_adapter"].startswith("bundled, 2 layers")
    tensors = load_file(world / "models" / "dit.safetensors")
    dit = sum(t.numel() for k, t in tensors.items() if "llm_adapter" not in k)
    assert facts["parameters"] == dit
    assert "--pretrained_model_name_or_path" in found["option"]
    assert found["programs"]["sd-scripts"].startswith("no: it takes 28 blocks")
    text = inspection_text(found, 80)
    assert f"\nparameters       {dit:,}\n" in text and "context width    32" in text


@pytest.mark.skipif(sys.platform == "win32", reason="files have no holes there")
def test_full_size_files_are_described_from_their_headers(tmp_path):
    shapes = golden.load_json("keys_dit")
    own = {k: v for k, v in shapes.items() if not k.startswith("llm_adapter.")}
    adapter = {k: v for k, v in shapes.items() if k not in own}
    published = look(sparse_file(tmp_path / "base.safetensors", shapes, "net."))
    assert published["facts"]["parameters"] == 2_091_068_928 - 134_663_680
    assert "134,663,680" in published["facts"]["llm_adapter"]
    assert published["facts"]["size"] == "4.18 GB"
    assert published["programs"] == dict.fromkeys(("ComfyUI", "sd-scripts", "anima-fast"), "yes")

    saved = look(sparse_file(tmp_path / "merged.safetensors", shapes, "model.diffusion_model."))
    assert saved["programs"]["ComfyUI"] == saved["programs"]["anima-fast"] == "yes"
    assert saved["programs"]["sd-scripts"].startswith("no: it takes names")

    bare = look(sparse_file(tmp_path / "bare.safetensors", own))
    assert bare["facts"]["prefix"] == "none"
    assert bare["facts"]["llm_adapter"] == "none: give its file with --llm_adapter_path"
    assert bare["programs"]["sd-scripts"].startswith("no: it needs the LLM adapter")
    assert bare["programs"]["anima-fast"] == "yes"

    alone = look(sparse_file(tmp_path / "adapter.safetensors", adapter))
    assert (alone["kind"], alone["option"]) == ("llm_adapter", "--llm_adapter_path")
    assert alone["facts"]["parameters"] == 134_663_680 and alone["facts"]["vocabulary"] == 32128

    whole = {f"model.diffusion_model.{k}": v for k, v in own.items()} | {"vae.conv1.weight": [2, 2]}
    mixed = look(sparse_file(tmp_path / "all.safetensors", whole))
    assert mixed["kind"] == "dit" and "other models" in mixed["notes"][0]
    assert mixed["programs"]["anima-fast"] == "yes"

    qwen3 = look(sparse_file(tmp_path / "qwen3.safetensors", golden.load_json("keys_qwen3")))
    assert qwen3["title"] == "Qwen3-0.6B text encoder" and qwen3["notes"] == []
    assert qwen3["facts"]["parameters"] == 596_049_920
    assert set(qwen3["programs"].values()) == {"yes"}

    for naming, program in (("wan", "ComfyUI"), ("diffusers", "diffusers")):
        names = {entry[naming]: entry["shape"] for entry in golden.load_json("keys_vae")}
        vae = look(sparse_file(tmp_path / "vae.safetensors", names))
        assert (vae["kind"], vae["option"]) == ("vae", "--vae")
        assert vae["facts"]["latent_channels"] == 16 and vae["facts"]["base_width"] == 96
        assert vae["facts"]["parameters"] == 126_892_531
        assert vae["programs"] == dict.fromkeys((program, "sd-scripts", "anima-fast"), "yes")


def test_what_is_said_about_loading_a_dit_is_what_loading_does(tmp_path):
    weights = dit_weights()
    path = tmp_path / "dit.safetensors"
    changes = {
        "missing": {k: v for k, v in weights.items() if k != "blocks.1.mlp.layer2.weight"},
        "unexpected": {**weights, "blocks.1.mlp.layer2.scale_weight": torch.ones(1)},
        "another shape": {**weights, "blocks.1.mlp.layer2.weight": torch.ones(2, 2)},
        "unquantised": {k: v.to(torch.int8) for k, v in weights.items()},
    }
    for word, tensors in changes.items():
        save_file(tensors, path)
        found = look(path)
        with pytest.raises(UserError, match=word):
            load_dit(path)
        assert word in found["notes"][0]
        assert found["programs"] == {"anima-fast": "no: see the note"} and found["option"] is None
    del weights["final_layer.linear.weight"]
    save_file(weights, path)
    assert "not a complete Anima DiT" in refusal(path)


def test_adapter_of_its_own_width(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_file(adapter_weights(), path)
    facts = look(path)["facts"]
    assert facts["reads"].endswith(f"width {TINY_ADAPTER.source_width}")
    assert facts["gives"].endswith(f"width {TINY_ADAPTER.context_dim}")
    assert facts["dtype"] == "float32"
    weights = adapter_weights()
    del weights["blocks.1.mlp.2.bias"]
    save_file(weights, path)
    assert "1 tensors missing" in look(path)["notes"][0]


def test_qwen3_folder_file_and_shards(world, tmp_path):
    source = world / "models" / "qwen3"
    folder, file = look(source), look(source / "model.safetensors")
    assert folder["kind"] == file["kind"] == "qwen3"
    assert folder["facts"]["form"] == "Hugging Face folder, 1 file"
    assert file["facts"]["form"] == "single file"
    for found in (folder, file):
        assert (found["facts"]["layers"], found["facts"]["width"]) == (2, 32)
        assert found["facts"]["dtype"] == "bfloat16" and found["option"] == "--qwen3"
        assert "Qwen3-0.6B" in found["notes"][0]

    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(source / "config.json", shards)
    tensors = load_file(source / "model.safetensors")
    weight_map = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({k: t for k, t in tensors.items() if weight_map[k] == name}, shards / name)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    sharded = look(shards)["facts"]
    assert sharded["form"] == "Hugging Face folder, 2 files"
    assert sharded["parameters"] == folder["facts"]["parameters"]

    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    cut = look(tmp_path / "cut.safetensors")
    assert "layers.1.mlp.up_proj.weight" in cut["notes"][0] and cut["option"] is None
    (shards / "model-1.safetensors").unlink()
    assert "model-1.safetensors" in refusal(shards)


def test_vae_and_pickle(world, tmp_path):
    found = look(world / "models" / "vae.safetensors")
    assert found["facts"]["base_width"] == 16 and found["facts"]["naming"].startswith("Wan")
    tensors = load_file(world / "models" / "vae.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "vae.pth")
    pickled = look(tmp_path / "vae.pth")
    assert pickled["facts"]["dtype"] == "bfloat16"
    assert pickled["facts"]["parameters"] == found["facts"]["parameters"]
    assert pickled["programs"]["sd-scripts"].startswith("no")
    tensors.pop("encoder.head.2.weight")
    save_file(tensors, tmp_path / "vae.safetensors")
    assert "encoder.head.2.weight" in refusal(tmp_path / "vae.safetensors")


# LoRA


def test_lora_of_a_run_in_three_dialects(world, tmp_path):
    source = world / "out" / "lora.safetensors"
    kohya = look(source)
    facts = kohya["facts"]
    assert (kohya["title"], facts["names"], facts["rank"]) == ("LoRA for Anima", "kohya", "4")
    assert (facts["alpha"], facts["scale"], facts["dit_width"]) == ("4", "1", 64)
    assert facts["modules"] == {"total": 20, "dit": 20} and facts["dit_blocks"] == 2
    parts = read_lora(source)[0].values()
    assert facts["parameters"] == sum(p.down.numel() + p.up.numel() for p in parts)
    assert kohya["metadata"]["seed"] == "7" and kohya["metadata"]["base_model"] == "anima"
    loads = {
        "kohya": {"ComfyUI", "Forge Neo, SwarmUI", "sd-scripts", "anima-fast"},
        "comfyui": {"ComfyUI", "Forge Neo, SwarmUI", "anima-fast"},
        "folded": {"ComfyUI", "Forge Neo, SwarmUI", "diffusers", "anima-fast"},
        "diffusers": {"diffusers", "anima-fast"},
    }
    for name, expected in loads.items():
        path = tmp_path / f"{name}.safetensors"
        folded = name == "folded"
        dialect = "comfyui" if folded else name
        convert_file(source, path, to=dialect, fold_alpha=folded)
        found = look(path)
        assert found["facts"]["names"] == dialect
        assert {k for k, v in found["programs"].items() if v == "yes"} == expected
        if name in ("folded", "diffusers"):
            assert found["facts"]["alpha"].startswith("not stored")
            assert found["facts"]["folded_alpha"].startswith("4 ")


def test_lora_of_several_ranks_with_text_encoder(tmp_path):
    path = tmp_path / "lora.safetensors"
    tensors = {}
    for i in range(8):
        module = f"lora_te_layers_{i}_mlp_up_proj" if i < 3 else f"lora_unet_blocks_{i}_mlp_layer1"
        rank = 4 if i < 3 else i
        tensors[f"{module}.lora_down.weight"] = torch.zeros(rank, 16)
        tensors[f"{module}.lora_up.weight"] = torch.zeros(16, rank)
        tensors[f"{module}.alpha"] = torch.tensor(2.0 if i else 8.0)
    save_file(tensors, path)
    found = look(path)
    assert found["facts"]["modules"] == {"total": 8, "text_encoder": 3, "dit": 5}
    assert found["facts"]["rank"].startswith("3 (1 module), 4 (4 modules), 5 (1 module)")
    assert found["facts"]["alpha"] == "2 (7 modules), 8 (1 module)"
    assert found["facts"]["scale"] == "0.285714 to 2 (6 different values)"
    assert "May 2026" in found["programs"]["ComfyUI"]
    # The remedy is one that `convert` accepts.
    assert found["programs"]["diffusers"] == "no: convert --to comfyui --fold_alpha"
    convert_file(path, tmp_path / "folded.safetensors", to="comfyui", fold_alpha=True)
    folded = look(tmp_path / "folded.safetensors")["programs"]["diffusers"]
    assert folded == "yes, without the text encoder part"


@pytest.mark.parametrize(
    ("title", "tensors", "sd_scripts"),
    [
        (
            "LoHa",
            {f"hada_w{i}_{side}": torch.ones(2, 2) for i in (1, 2) for side in "ab"},
            "networks.loha",
        ),
        ("LoKr", {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 4)}, "networks.lokr"),
        (
            "LoKr",
            {
                "lokr_w1": torch.ones(2, 2),
                "lokr_w2_a": torch.ones(4, 2),
                "lokr_w2_b": torch.ones(2, 4),
            },
            "networks.lokr",
        ),
        (
            "DoRA",
            {
                "lora_down__weight": torch.ones(2, 8),
                "lora_up__weight": torch.ones(8, 2),
                "dora_scale": torch.ones(8, 1),
            },
            "lycoris.kohya",
        ),
    ],
)
def test_other_networks(tmp_path, title, tensors, sd_scripts):
    path = lora_file(tmp_path / "net.safetensors", alpha=torch.tensor(1.0), **tensors)
    found = look(path)
    assert found["title"] == f"{title} for Anima" and "sample --lora" in found["option"]
    full = "lokr_w2" in tensors
    assert found["facts"]["rank"] == ("none: both factors are stored whole" if full else "2")
    assert found["facts"]["scale"] == ("1" if full else "0.5")
    programs = found["programs"]
    assert programs["ComfyUI"].startswith("yes")
    assert ("ignores alpha" in programs["ComfyUI"]) == full
    assert programs["sd-scripts"] == f"yes, with --network_module {sd_scripts}"
    assert programs["diffusers"].startswith("no") and programs["anima-fast"] == "yes"
    assert found["facts"]["dit_width"] == read_lora(path)[0]["blocks.0.self_attn.q_proj"].shape[1]


@pytest.mark.parametrize(
    "module", ["lycoris_blocks_0_self_attn_q_proj", "base_model.model.blocks.0.self_attn.q_proj"]
)
def test_names_that_no_image_program_reads(tmp_path, module):
    path = tmp_path / "net.safetensors"
    lora_file(
        path, None, (module,), lora_A__weight=torch.ones(2, 8), lora_B__weight=torch.ones(8, 2)
    )
    found = look(path)
    assert found["facts"]["names"] == "other" and found["facts"]["dit_width"] == 8
    assert any("adapter_config" in note for note in found["notes"]) == ("base" in module)
    programs = found["programs"]
    assert programs["anima-fast"] == "yes" and programs["ComfyUI"].startswith("no: convert")
    assert programs["sd-scripts"] == "no: convert --to kohya"
    # The remedies are ones that `convert` accepts.
    convert_file(path, tmp_path / "a.safetensors", to="diffusers")
    assert look(tmp_path / "a.safetensors")["programs"]["diffusers"] == "yes"
    convert_file(path, tmp_path / "b.safetensors", to="comfyui")
    assert look(tmp_path / "b.safetensors")["programs"]["ComfyUI"] == "yes"


def test_lora_that_is_not_all_anima(tmp_path):
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    pair = {"lora_down__weight": down, "lora_up__weight": up}
    mixed = lora_file(
        tmp_path / "mixed.safetensors", None, (Q, "lora_te1_text_model_0_fc1"), **pair
    )
    found = look(mixed)
    with pytest.raises(UserError, match="no module of Anima"):
        read_lora(mixed)
    assert len(read_lora(mixed, [])[0]) == 1
    assert "tensors of no module of Anima: 2" in found["notes"][0]
    assert found["option"] == "train --network_weights"
    assert not any("convert" in text for text in found["programs"].values())

    other = lora_file(tmp_path / "sdxl.safetensors", None, ("lora_unet_mid_block_conv1",), **pair)
    found = look(other)
    assert "another model" in found["title"] and found["programs"] == {"anima-fast": "no"}


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_down__weight": torch.ones(2, 8)},
        {"lora_down__weight": torch.ones(2, 8), "lora_up__weight": torch.ones(8, 3)},
        {"lora_down__weight": torch.ones(0, 8), "lora_up__weight": torch.ones(8, 0)},
        {"lora_down__weight": torch.tensor(1.0), "lora_up__weight": torch.ones(8)},
        {
            "lora_down__weight": torch.ones(2, 8),
            "lora_up__weight": torch.ones(8, 2),
            "alpha": torch.ones(2),
        },
        {"lokr_w1": torch.ones(2, 2)},
        {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 2)},
        {f"hada_w{i}_{side}": torch.ones(2, 2) for i, side in ("1a", "1b", "2a")},
        {f"hada_w{i}": torch.ones(2, 2) for i in ("1_a", "1_b", "2_a")}
        | {"hada_w2_b": torch.ones(3, 2)},
        {
            "lora_down__weight": torch.ones(2, 8),
            "lora_up__weight": torch.ones(8, 2),
            "dora_scale": torch.ones(3, 1),
        },
    ],
)
def test_incomplete_lora(tmp_path, tensors):
    found = look(lora_file(tmp_path / "half.safetensors", **tensors))
    assert "incomplete or damaged modules: 1" in found["notes"][0]
    assert found["programs"] == {"anima-fast": "no: see the note"} and found["option"] is None


def test_metadata_cannot_reach_the_terminal(tmp_path):
    metadata = {
        "ss_training_comment": "\x1b[2Jtwo\nlines" + "x" * 500,
        "anima_fast.folded_alphas": '{"blocks.0.self_attn.q_proj": "NaN or not"}',
    }
    pair = {"lora_down__weight": torch.ones(2, 8), "lora_up__weight": torch.ones(8, 2)}
    text = inspection_text(inspect_file(lora_file(tmp_path / "lora.safetensors", metadata, **pair)))
    assert "[2Jtwo" in text and "\x1b" not in text and "x" * 200 not in text


# Caches and states


def test_own_caches(world):
    folder = world / "images" / ".anima_cache"
    path = next(folder.glob("image2-*.latents.safetensors"))
    latents = look(path)
    facts = latents["facts"]
    assert (latents["kind"], facts["image"], facts["image_size"]) == (
        "latent_cache", "image2.png", "96x48",
    )  # fmt: skip
    assert facts["vae"] == "vae.safetensors" and facts["computed_in"] == "float32"
    width, height = map(int, facts["bucket"].split("x"))
    assert facts["tensors"] == {"latents": f"[16, {height // 8}, {width // 8}]"}
    assert path.name.startswith(f"image2-{facts['key'][:16]}.")
    assert latents["programs"] == {"anima-fast": "yes, found by its key"}
    texts = [look(path) for path in folder.glob("*.text.safetensors")]
    assert {found["kind"] for found in texts} == {"text_cache"}
    assert "picture 2, red tree, blue sky, number 2" in {f["facts"]["caption"] for f in texts}
    assert all(found["facts"]["tensors"]["context"].endswith(", 32]") for found in texts)
    assert "caption" in texts[0]["facts"]["keyed_by"]


def test_cache_of_another_version_and_empty_cache(tmp_path):
    path = tmp_path / "a.latents.safetensors"
    metadata = {"format": "anima_fast.latents", "version": "0", "key": "k"}
    save_file({"latents": torch.ones(16, 2, 2)}, path, metadata)
    assert "version 0" in look(path)["notes"][0]
    save_file({"alpha_mask": torch.ones(2, 2)}, path, metadata)
    assert "without its tensors" in refusal(path)


def write_npz(folder):
    latents, texts = folder / "a_0064x0128_anima.npz", folder / "a_anima_te.npz"
    array = np.zeros((16, 16, 8), np.float32)
    np.savez(latents, latents_16x8=array, latents_flipped_16x8=array)
    np.savez_compressed(
        texts,
        prompt_embeds=np.zeros((512, 32), np.float32),
        attn_mask=np.arange(512) < 12,
        t5_input_ids=np.ones(512, np.int64),
        t5_attn_mask=(np.arange(512) < 9).astype(np.int32),
        caption_dropout_rate=np.float32(0),
    )
    return latents, texts


def test_caches_of_sd_scripts(tmp_path):
    latents, texts = write_npz(tmp_path)
    found = look(latents)
    assert found["kind"] == "sd_scripts_latent_cache"
    assert found["facts"]["image_size"] == found["facts"]["bucket"] == "64x128"
    assert (found["facts"]["flipped"], found["facts"]["alpha_mask"]) == ("yes", "no")
    assert found["facts"]["tensors"]["latents_16x8"] == "[16, 16, 8]"
    assert found["programs"] == {"sd-scripts": "yes", "anima-fast": "yes"}
    found = look(texts)
    assert found["kind"] == "sd_scripts_text_cache"
    assert found["facts"]["tokens"] == "12 of Qwen3, 9 of T5" and found["facts"]["width"] == 32
    assert read_text(texts)[1] == 12
    renamed = latents.rename(tmp_path / "renamed.npz")
    assert look(renamed)["programs"]["anima-fast"].startswith("no: its name")


def test_resume_states(world, tmp_path):
    source = world / "out" / "lora-state"
    found = look(source)
    assert (found["kind"], found["option"]) == ("resume_state", "train --resume")
    facts = found["facts"]
    assert (facts["step"], facts["epoch"], facts["batch_of_epoch"], facts["seed"]) == (4, 2, 0, 7)
    assert found["title"] == "resume state after step 4, 1 whole epoch done"
    assert "AdamW" in facts["optimizer"] and "network.safetensors" in facts["files"]
    assert look(source / "network.safetensors")["kind"] == "lora"

    state = tmp_path / "lora-state"
    shutil.copytree(source, state)
    text = (state / "state.json").read_text()
    (state / "state.json").write_text(text.replace('"step": 4', '"step": 5'))
    assert "altered" in refusal(state)
    (state / "state.json").unlink()
    assert "damaged" in refusal(state)
    (state / "state.json").write_text(text)
    (state / "optimizer.json").unlink()
    assert "optimizer.json is missing" in refusal(state)

    foreign = tmp_path / "foreign-state"
    foreign.mkdir()
    shutil.copy(source / "network.safetensors", foreign / "model.safetensors")
    (foreign / "train_state.json").write_text('{"current_epoch": 3, "current_step": 30}')
    found = look(foreign)
    assert found["kind"] == "sd_scripts_state" and found["facts"] == {"step": 30, "epoch": 3}


# Other and damaged files


def test_unknown_file_is_described(tmp_path):
    path = tmp_path / "unknown.safetensors"
    tensors = {f"layer{i}.x": torch.ones(2, i) for i in range(1, 20)}
    save_file(tensors | {"ids": torch.ones(3, dtype=torch.int64)}, path, {"format": "pt"})
    found = look(path)
    assert found["kind"] == "unknown" and found["facts"]["tensors"] == 20
    assert len(found["facts"]["first_tensors"]) == 8
    assert set(found["facts"]["first_tensors"]) <= {*tensors, "ids"}
    assert found["facts"]["dtype"] == "float32 (19 tensors), int64 (1 tensor)"
    assert found["metadata"] == {"format": "pt"} and found["option"] is None


class Command:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_pickles_never_runs(tmp_path):
    victim = str(tmp_path / "victim")
    torch.save({"x": Command(victim)}, tmp_path / "a.pt")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Command(victim)))
    np.savez(tmp_path / "c_anima.npz", latents_8x8=np.array([Command(victim)], dtype=object))
    (tmp_path / "d.ckpt").write_bytes(pickle.dumps(Command(victim), protocol=2))
    (tmp_path / "e.safetensors").write_bytes(pickle.dumps(Command(victim)))
    for name in ("a.pt", "b.npz", "c_anima.npz", "d.ckpt", "e.safetensors"):
        assert "unsafe" not in refusal(tmp_path / name)
    assert not (tmp_path / "victim").exists()


def test_damaged_files(world, tmp_path):
    data = (world / "models" / "dit.safetensors").read_bytes()
    latents, texts = write_npz(tmp_path)
    files = {
        "cut.safetensors": data[:-1],
        "header.safetensors": data[:100],
        "empty.safetensors": b"",
        "nothing.safetensors": struct.pack("<Q", 2) + b"{}",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\nsize 12\n",
        "page.pth": b"<html>not found</html>",
        "empty.npz": b"",
        "latents.npz": latents.read_bytes()[:-40],
        "texts.npz": texts.read_bytes()[:100],
        "photo.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "notes.txt": b"hello",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)
    assert "cut off" in refusal(tmp_path / "cut.safetensors")
    assert "is empty" in refusal(tmp_path / "empty.npz")
    assert "expected a model, LoRA or cache file" in refusal(tmp_path / "photo.png")
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    assert "not a cache of images or captions" in refusal(tmp_path / "other.npz")
    for name in ("absent.safetensors", "absent.npz", "a" * 400):
        refusal(tmp_path / name)


def test_flipped_bytes_of_old_caches_are_user_errors(tmp_path):
    rng = np.random.default_rng(0)
    for path in write_npz(tmp_path):
        data = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(len(data), size=4):
                damaged[position] = rng.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(UserError):
                inspect_file(path)


def test_folders(world, tmp_path):
    text = refusal(world / "out")
    assert "lora.safetensors" in text and "lora-state" in text
    assert "nothing that inspect reads" in refusal(tmp_path)
    assert "nothing that inspect reads" in refusal(world / "models" / "t5")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLQwenImage"}')
    shutil.copy(world / "models" / "vae.safetensors", tmp_path / "vae.safetensors")
    assert "give one of them (vae.safetensors)" in refusal(tmp_path)


# The command


def test_command(world, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = str(world / "out" / "lora.safetensors")
    done = CliRunner().invoke(app, ["inspect", path])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[:2] == ["LoRA for Anima", path]
    assert done.stdout == inspection_text(inspect_file(path), 80) + "\n"
    done = CliRunner().invoke(app, ["inspect", "--json", path])
    assert done.exit_code == 0 and json.loads(done.stdout) == inspect_file(path)
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    for bad in (tmp_path / "x.safetensors", tmp_path / "absent", tmp_path):
        done = CliRunner().invoke(app, ["inspect", str(bad)])
        assert done.exit_code == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
