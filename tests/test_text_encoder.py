"""The Qwen3 text encoder: golden vectors, both file layouts, padding, gradients, refusals."""

import json

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_fast.errors import UserError
from anima_fast.models.text_encoder import load_text_encoder

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen3 as transformers saves it."""
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen3")
    Qwen3Model(Qwen3Config(**SIZES, rope_theta=1e6)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def state(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder, dtype=torch.float32)


def tokens(*lengths, columns=None):
    columns = columns or max(lengths)
    ids = torch.randint(0, 50, (len(lengths), columns), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


@torch.inference_mode()
def test_golden(tmp_path):
    tensors, _ = golden.load("qwen3_tiny")
    save_file(golden.weights(tensors), tmp_path / "qwen.safetensors")
    encoder = load_text_encoder(tmp_path / "qwen.safetensors", dtype=torch.float32)
    states = encoder(tensors["ids"], tensors["mask"])
    torch.testing.assert_close(states, tensors["hidden"], atol=5e-5, rtol=1e-4)
    assert (states[~tensors["mask"].bool()] == 0).all()
    assert (tensors["mask"].sum(1) == 0).any()


@torch.inference_mode()
def test_matches_transformers_with_its_mask(folder, encoder):
    from transformers import Qwen3Model

    ids, mask = tokens(7, 3, 5)
    theirs = Qwen3Model.from_pretrained(folder).float().eval()
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    torch.testing.assert_close(encoder(ids, mask), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_single_files_equal_the_directory(folder, state, encoder, tmp_path):
    ids, mask = tokens(6, 2)
    expected = encoder(ids, mask)
    prefixed = {f"model.{k}": v for k, v in state.items()}
    prefixed["lm_head.weight"] = state["embed_tokens.weight"].clone()
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    for path in (folder / "model.safetensors", tmp_path / "prefixed.safetensors",
                 tmp_path / "plain.pth"):  # fmt: skip
        single = load_text_encoder(path, dtype=torch.float32)
        assert torch.equal(single(ids, mask), expected), path.name
    assert single.hidden_size == 32


@torch.inference_mode()
def test_sharded_directory(folder, state, encoder, tmp_path):
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({f"model.{k}": state[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {f"model.{k}": file for file, keys in shards.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text(encoding="utf-8"))
    sharded = load_text_encoder(tmp_path, dtype=torch.float32)
    ids, mask = tokens(6, 2)
    assert torch.equal(sharded(ids, mask), encoder(ids, mask))
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-2\.safetensors"):
        load_text_encoder(tmp_path)


@torch.inference_mode()
def test_padding_changes_nothing(encoder):
    ids, mask = tokens(5, 3)
    longer, longer_mask = torch.cat([ids, ids], 1), torch.cat([mask, 0 * mask], 1)
    states = encoder(ids, mask)
    wide = encoder(longer, longer_mask)
    torch.testing.assert_close(wide[:, :5], states, atol=2e-6, rtol=0)
    assert (wide[:, 5:] == 0).all() and (states[1, 3:] == 0).all()
    alone = encoder(ids[1:, :3], mask[1:, :3])
    torch.testing.assert_close(alone, states[1:, :3], atol=2e-6, rtol=0)


@torch.inference_mode()
def test_fully_padded_row_is_zero(folder):
    ids, mask = tokens(0, 4)
    for dtype in (torch.float32, torch.bfloat16):
        states = load_text_encoder(folder, dtype=dtype)(ids, mask)
        assert states.dtype == dtype
        assert (states[0] == 0).all() and states.isfinite().all() and states[1].abs().max() > 0


def test_gradients_flow_to_what_asks_for_them(folder):
    encoder = load_text_encoder(folder, dtype=torch.float32)
    assert not any(p.requires_grad for p in encoder.parameters())
    weight = encoder.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    ids, mask = tokens(0, 4)
    encoder(ids, mask).square().sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0


def test_rope_base_comes_from_the_config(folder, state, tmp_path):
    from transformers import Qwen3Config

    save_file(state, tmp_path / "model.safetensors")
    Qwen3Config(**SIZES, rope_theta=500.0).save_pretrained(tmp_path)
    frequencies = load_text_encoder(tmp_path).model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 500.0 ** -(torch.arange(8) / 8))
    single = load_text_encoder(tmp_path / "model.safetensors").model.rotary_emb.inv_freq
    torch.testing.assert_close(single, 1e6 ** -(torch.arange(8) / 8))
    assert single.dtype == torch.float32


def test_published_names(folder):
    """Every published tensor is one of ours for the real sizes, and none is left out."""
    from anima_fast.models.text_encoder import _empty_model, _infer

    table = golden.load_json("keys_qwen3")
    rows = table.items() if isinstance(table, dict) else ((r["key"], r["shape"]) for r in table)
    shapes = {k.removeprefix("model."): tuple(v) for k, v in rows if k != "lm_head.weight"}
    shape = _infer(shapes, folder)
    assert (shape.num_hidden_layers, shape.num_attention_heads, shape.head_dim) == (28, 16, 128)
    state = _empty_model(shape, {}, "cpu").state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes


def edit(state, **changes):
    edited = dict(state)
    for name, value in changes.items():
        name = name.replace("__", ".")
        edited.pop(name, None)
        if value is not None:
            edited[name] = value
    return edited


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm__weight": None}, "1 tensors missing (norm.weight)"),
        ({"layers__0__mlp__up_proj__weight": None}, "layers.0.mlp.up_proj.weight"),
        ({"layers__0__mlp__gate_proj__weight": None}, "layers.0.mlp.gate_proj.weight"),
        ({"visual__weight": torch.zeros(2)}, "1 tensors unexpected (visual.weight)"),
        ({"layers__1__self_attn__q_norm__weight": torch.ones(3)}, "[3] instead of [16]"),
        ({"embed_tokens__weight": None}, "lacks embed_tokens.weight"),
        ({"layers__0__self_attn__q_norm__weight": None}, "another architecture"),
        ({"layers__0__self_attn__q_proj__bias": torch.ones(64)}, "another architecture"),
        ({"layers__3__mlp__up_proj__weight": torch.zeros(48, 32)}, "missing (layers.2."),
    ],
)
def test_refuses_incomplete_or_other_decoders(state, tmp_path, changes, words):
    save_file(edit(state, **changes), tmp_path / "qwen.safetensors")
    with pytest.raises(UserError) as error:
        load_text_encoder(tmp_path / "qwen.safetensors")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
        ("net.blocks.0.self_attn.q_proj.weight", "--qwen3"),
        ("something.weight", "not a model that this program knows"),
    ],
)
def test_refuses_other_models(tmp_path, key, words):
    save_file({key: torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=words):
        load_text_encoder(tmp_path / "other.safetensors")


def test_refuses_directories_that_do_not_fit(folder, state, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_text_encoder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_text_encoder(tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write = (tmp_path / "config.json").write_text
    write(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="0 safetensors files"):
        load_text_encoder(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    write(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(UserError, match="num_hidden_layers = 3"):
        load_text_encoder(tmp_path)
    write(json.dumps(config | {"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(UserError, match="'llama'"):
        load_text_encoder(tmp_path)
    write("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot read"):
        load_text_encoder(tmp_path)


def test_wrong_call_shapes(encoder):
    ids, mask = tokens(3)
    with pytest.raises(ValueError, match="expected"):
        encoder(ids, mask[:, :2])
