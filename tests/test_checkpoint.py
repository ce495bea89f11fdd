"""Model files: kinds, prefixes, leftovers, and one readable error for each thing that is wrong."""

import golden
import pytest
import torch
from safetensors.torch import save_file
from tiny_dit import TINY, adapter_weights, dit_weights, make_dit, make_inputs

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import Checkpoint, detect_kind, strip_prefix
from anima_fast.models.dit import load_dit

PREFIXES = ["net.", "model.diffusion_model.", "diffusion_model.", "model.", ""]


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def empty(*names):
    """A state dict of those names."""
    return {name: torch.zeros(1) for name in names}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_leftovers_and_other_models(prefix, tmp_path):
    weights = dit_weights()
    stored = prefixed(prefix, weights)
    stored |= prefixed(prefix + "llm_adapter.", adapter_weights())
    ignored = (
        "pos_embedder.seq",
        "pos_embedder.dim_spatial_range",
        "llm_adapter.blocks.0.rotary_emb.inv_freq",
        "blocks.0.self_attn.rotary_emb.inv_freq",
        "accum_video_sample_counter",
        "blocks.0.self_attn._extra_state",
        "_extra_state",
        "model_sampling.sigmas",
    )
    stored |= prefixed(prefix, empty(*ignored))
    stored |= empty(
        "first_stage_model.conv1.weight",
        "cond_stage_model.x",
        "text_encoders.qwen3_06b.transformer.model.norm.weight",
        "vae.encoder.conv1.weight",
    )
    path = tmp_path / "all.safetensors"
    save_file(stored, path)
    for source in (path, str(path), stored):
        dit = load_dit(source, dtype=torch.float32)
        assert dit.config == TINY
        assert dit.state_dict().keys() == weights.keys()
        assert all(torch.equal(v, weights[k]) for k, v in dit.state_dict().items())
        assert not dit.training and not any(p.requires_grad for p in dit.parameters())
    assert strip_prefix(stored) == prefix
    assert detect_kind(Checkpoint.open(path)) == "dit"


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_plain_tensors(tmp_path, zipped):
    path = tmp_path / "dit.pth"
    content = {"state_dict": dit_weights(), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    inputs = make_inputs()
    torch.testing.assert_close(load_dit(path, dtype=torch.float32)(*inputs), make_dit()(*inputs))


class Sinister:
    """Pickled code."""

    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".pt"])
def test_pickled_code_is_refused(tmp_path, suffix, capsys):
    path = tmp_path / f"dit{suffix}"
    torch.save({"a": Sinister()}, path)
    with pytest.raises(UserError, match="not a PyTorch file of plain tensors"):
        load_dit(path)
    assert "ran code" not in capsys.readouterr().out


def test_checkpoint_reads_without_loading(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"note": "x"})
    checkpoint = Checkpoint.open(path)
    assert sorted(checkpoint.shapes) == ["a", "b"]
    assert checkpoint.shapes["a"] == (2, 3) and checkpoint.get("b").dtype == torch.bfloat16
    assert torch.equal(checkpoint.get("a"), tensors["a"])
    assert checkpoint.metadata == {"note": "x"} and checkpoint.path == path
    assert Checkpoint.from_state_dict(tensors).shapes["b"] == (4,)


KINDS = {
    "vae": ["encoder.conv1.weight", "decoder.middle.0.residual.0.gamma", "conv1.bias"],
    "qwen3": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"],
    "lora": ["lora_unet_blocks_0_mlp_layer1.lora_down.weight"],
    "llm_adapter": ["llm_adapter.out_proj.weight", "llm_adapter.embed.weight"],
    "unknown": ["something.weight"],
}
REMEDIES = {
    "vae": "this is a Qwen-Image VAE; give it to --vae",
    "qwen3": "this is a Qwen3 text encoder; give it to --qwen3",
    "lora": "this is a LoRA; give it to --network_weights",
    "llm_adapter": "this is an LLM adapter; give it to --llm_adapter_path",
    "unknown": "this is not a model that this program knows",
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_another_kind_are_named(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(empty(*KINDS[kind]), path)
    assert detect_kind(Checkpoint.open(path)) == kind
    with pytest.raises(UserError) as caught:
        load_dit(path)
    assert REMEDIES[kind] in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["latent", "text"])
def test_caches_are_named(kind, tmp_path):
    path = tmp_path / "cache.safetensors"
    name = {"latent": "anima_fast.latents", "text": "anima_fast.text"}[kind]
    save_file(empty("latents"), path, metadata={"format": name})
    assert detect_kind(Checkpoint.open(path)) == f"{kind}_cache"
    with pytest.raises(UserError, match=f"this is a {kind} cache"):
        load_dit(path)
    other = tmp_path / "0001_0064x0064_anima.npz"
    other.write_bytes(b"PK")
    with pytest.raises(UserError, match="cache of encoded images or captions"):
        load_dit(other)


def test_kinds_of_the_published_tables():
    dit = golden.load_json("keys_dit")
    assert detect_kind(Checkpoint(dit, lambda _: None)) == "dit"
    for prefix in ("", "model."):
        names = {prefix + key.removeprefix("model."): () for key in golden.load_json("keys_qwen3")}
        assert detect_kind(Checkpoint(names, lambda _: None)) == "qwen3"
    vae, _ = golden.load("vae_dim96_recipe")
    assert vae
    lora, _ = golden.load("lora_kohya")
    assert detect_kind(Checkpoint.from_state_dict(lora)) == "lora"
    lora, _ = golden.load("lora_comfy")
    assert detect_kind(Checkpoint.from_state_dict(lora)) == "lora"


def test_missing_and_unexpected_tensors_are_named_and_counted():
    weights = prefixed("net.", dit_weights())
    for name in [k for k in weights if k.startswith("net.blocks.1.self_attn.")]:
        del weights[name]
    weights |= empty("net.blocks.0.surprise", "net.loss_weight")
    with pytest.raises(UserError) as caught:
        load_dit(weights)
    message = str(caught.value)
    assert "6 tensors missing (blocks.1.self_attn.k_norm.weight, " in message
    assert "..." in message and "2 tensors unexpected (blocks.0.surprise, loss_weight)" in message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    "name",
    [
        "x_embedder.proj.1.weight",
        "blocks.0.self_attn.q_norm.weight",
        "blocks.0.cross_attn.k_proj.weight",
        "blocks.0.adaln_modulation_self_attn.1.weight",
        "blocks.0.mlp.layer1.weight",
        "final_layer.linear.weight",
        "t_embedding_norm.weight",
        "blocks.2.mlp.layer2.weight",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "zero", "flat", "other"])
def test_damaged_tensors_are_named(name, damage):
    weights = dit_weights()
    tensor = weights.pop(name)
    if damage == "zero":
        weights[name] = tensor[:0]
    elif damage == "flat":
        weights[name] = tensor.flatten()[:, None, None]
    elif damage == "other":
        weights[name] = torch.cat([tensor, tensor[:1]])
    with pytest.raises(UserError) as caught:
        load_dit(weights)
    # A wrong size that others are checked against shows in those.
    assert name in str(caught.value) or damage == "other"
    assert "\n" not in str(caught.value)


def test_quantised_weights_are_refused():
    weights = dit_weights()
    name = "blocks.0.mlp.layer1.weight"
    weights[name] = weights[name].to(torch.int8)
    with pytest.raises(UserError, match=r"blocks.0.mlp.layer1.weight is torch.int8"):
        load_dit(weights)


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"a": ' * 5000 + "0" + "}" * 5000,
        '["a"]',
    ],
    ids=["float", "one", "deep", "list"],
)
def test_damaged_headers(tmp_path, header):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(UserError, match="no readable safetensors header"):
        load_dit(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_dit(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        load_dit(tmp_path)
    whole = tmp_path / "whole.safetensors"
    save_file(dit_weights(), whole)
    data = whole.read_bytes()
    for length in (0, 5, 100, len(data) - 10):
        cut = tmp_path / f"cut{length}.safetensors"
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match="cut off"):
            load_dit(cut)
    text = tmp_path / "text.safetensors"
    text.write_text("<html>not found</html>" * 10, encoding="utf-8")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_dit(text)
    for content in (b"", b"junk" * 50):
        junk = tmp_path / "junk.pth"
        junk.write_bytes(content)
        with pytest.raises(UserError, match="not a PyTorch file"):
            load_dit(junk)
    torch.save({"step": 3}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="holds no tensors"):
        load_dit(tmp_path / "state.pt")


def test_weights_are_cast_one_by_one_and_never_on_meta():
    weights = dit_weights()
    dit = load_dit(weights, dtype=torch.bfloat16)
    for name, parameter in dit.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu"
        assert torch.equal(parameter, weights[name].bfloat16())
    assert not list(dit.buffers())
    # What already fits is shared, not copied.
    shared = load_dit(weights, dtype=torch.float32)
    name = "blocks.0.mlp.layer1.weight"
    assert shared.get_parameter(name).data_ptr() == weights[name].data_ptr()
