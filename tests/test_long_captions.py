"""Captions over 512 tokens: numerics of mixed batches, what is encoded, which caches are reused."""

import json

import numpy as np
import pytest
import torch
from encode_fakes import WIDTH, FakeTokenizers, Project, install
from stack import make_world, train_options
from tiny_dit import TINY, dit_weights

from anima_fast.adapters.lora import add_lora
from anima_fast.data.batches import Batches, pad_contexts
from anima_fast.data.cache import TextEntry
from anima_fast.errors import UserError
from anima_fast.kernels import dispatch
from anima_fast.models.dit import DitConfig, load_dit
from anima_fast.models.fuse import fuse_blocks

LENGTHS = (600, 75, 560, 512)


def contexts(lengths=LENGTHS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        TextEntry(context=torch.randn(n, TINY.context_dim, generator=generator).to(dtype))
        for n in lengths
    ]


def make_dit(fused, attn_mode="torch", dtype=torch.float64, blocks=2):
    config = DitConfig(**{**TINY.__dict__, "num_blocks": blocks})
    dit = load_dit(dit_weights(config), dtype=dtype, attn_mode=attn_mode)
    network = add_lora(dit, rank=2, alpha=2.0, seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    for adapter in network.adapters:
        adapter.up.data.copy_(torch.randn(adapter.up.shape, generator=generator) * 0.3)
    if fused:
        fuse_blocks(dit, "none")
    return dit, network


def velocity(dit, entries, dtype=torch.float64, zero_keys=None):
    """Velocities [B, 16, 4, 6] of the same image and noise level beside each text."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, TINY.in_channels, 4, 6, generator=generator, dtype=dtype)
    text = pad_contexts(entries)
    batch = len(entries)
    sigma = torch.full((batch,), 0.5, dtype=dtype)
    context = text.context.to(dtype)
    zero_keys = text.zero_keys if zero_keys is None else zero_keys
    return dit(latents.expand(batch, -1, -1, -1), sigma, context, zero_keys=zero_keys)


@pytest.mark.parametrize("attn_mode", ["torch", "triton"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_text_gives_the_same_alone_and_in_a_mixed_batch(fused, attn_mode):
    entries = contexts()
    dit, _ = make_dit(fused, attn_mode)
    with dispatch.use("reference"), torch.no_grad():
        together = velocity(dit, entries)
        alone = torch.cat([velocity(dit, [entry]) for entry in entries])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=1e-9)
    # Without the counts a short text would see 525 zero rows instead of 437.
    with dispatch.use("reference"), torch.no_grad():
        assert (velocity(dit, entries, zero_keys=0)[1] - alone[1]).abs().max() > 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_gradients_of_a_mixed_batch_are_those_of_its_samples(kernels):
    """Fused blocks, whose backward is their own, against eager ones a sample at a time."""
    dtype = torch.float32
    entries = contexts((530, 3))
    eager, plain = make_dit(False, dtype=dtype, blocks=1)
    for entry in entries:
        velocity(eager, [entry], dtype).square().sum().backward()
    fused, network = make_dit(True, dtype=dtype, blocks=1)
    with dispatch.use(kernels):
        velocity(fused, entries, dtype).square().sum().backward()
    wanted = plain.modules_by_name
    for name, adapter in network.modules_by_name.items():
        for kind in ("down", "up"):
            found, expected = getattr(adapter, kind).grad, getattr(wanted[name], kind).grad
            scale = expected.abs().max().clamp_min(1e-6)
            assert (found - expected).abs().max() / scale < 2e-4, f"{name}.{kind}"


def test_zero_rows_of_a_batch():
    """The counts are those of each text: 512 is a floor."""
    assert pad_contexts(contexts((75, 20))).zero_keys == 512 - 75
    assert pad_contexts(contexts((512, 20))).zero_keys == 0
    mixed = pad_contexts(contexts(LENGTHS))
    assert mixed.context.shape[1] == 600
    assert list(mixed.zero_keys) == [0, 512 - 600, 560 - 600, 512 - 600]
    assert pad_contexts(contexts((600, 600))).zero_keys == 0


LONG = " ".join(f"word{i}" for i in range(600))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Four captioned images, the second with 600 words, and models that count their work."""
    made = Project(tmp_path, install(monkeypatch))
    (made.images / "1.txt").write_text(LONG, encoding="utf-8")
    return made


def rows(encoded):
    return [len(entries[0].get().context) for entries in encoded.texts]


def test_cut_by_default_and_named(project):
    _, encoded, _ = project.encode()
    assert rows(encoded)[1] == 512
    named = [notice for notice in project.notices if "more than 512 tokens" in notice]
    assert len(named) == 1
    # 600 words and the end mark of T5.
    assert "1.txt: 601, 89 lost" in named[0] and "--long_captions whole" in named[0]
    # Said at every start, not only when something is encoded.
    project.encode()
    assert project.work.count["encoder"] == 0
    assert any("1.txt: 601, 89 lost" in notice for notice in project.notices)


def test_whole_captions_are_encoded_whole_and_cached_apart(project):
    project.encode()
    _, whole, _ = project.encode(long_captions="whole")
    assert rows(whole)[1] == 601
    # Only the long one is encoded again.
    assert project.work.count["encoder"] == 1 and project.work.count["adapter"] == 1
    assert any("1.txt: 601" in n and "encoded whole" in n for n in project.notices)
    # Both forms are kept: going back and forth encodes nothing.
    _, cut, _ = project.encode()
    _, again, _ = project.encode(long_captions="whole")
    assert project.work.count["encoder"] == 0
    assert rows(cut)[1] == 512 and rows(again)[1] == 601
    assert torch.equal(again.texts[0][0].get().context, cut.texts[0][0].get().context)
    assert torch.equal(again.texts[1][0].get().context, whole.texts[1][0].get().context)


def test_states_are_whole_too(project):
    project.settings["network_args"] = ("train_llm_adapter=True",)
    _, encoded, _ = project.encode(long_captions="whole")
    entry = encoded.texts[1][0].get()
    assert len(entry.t5_ids) == 601 and len(entry.source_states) == 600


def test_batches_carry_the_counts_of_their_texts(project):
    plan, encoded, options = project.encode(long_captions="whole")
    batch = Batches(plan, encoded, options, seed=0).load([0, 1], epoch=1, step=0)
    assert batch.text.context.shape[1] == 601
    # "a red cat" has four rows, and 508 zero rows beside them as always.
    assert batch.text.zero_keys == (512 - 601, 0)


def test_live_captions_are_named_too(project):
    project.settings = {"cache_latents": True}
    project.encode()
    assert sum("1.txt: 601, 89 lost" in notice for notice in project.notices) == 1
    project.encode(long_captions="whole")
    assert any("encoded whole (1.txt: 601)" in notice for notice in project.notices)


def write_legacy(project, caption, limit):
    """What sd-scripts leaves beside the second image."""
    tokens = FakeTokenizers().encode([caption], limit, limit)
    states = torch.zeros(limit, WIDTH)
    qwen, t5 = tokens.qwen_ids.shape[1], tokens.t5_ids.shape[1]
    mask, ids, t5_mask = (np.zeros(limit, np.int64) for _ in range(3))
    mask[:qwen], t5_mask[:t5], ids[:t5] = 1, 1, tokens.t5_ids[0].numpy()
    np.savez(
        project.images / "1_anima_te.npz", prompt_embeds=states.numpy(), attn_mask=mask,
        t5_input_ids=ids, t5_attn_mask=t5_mask, caption_dropout_rate=np.float32(0),
    )  # fmt: skip


def test_a_cut_cache_of_sd_scripts_is_not_a_whole_caption(project):
    write_legacy(project, LONG, 512)
    _, cut, _ = project.encode()
    assert rows(cut)[1] == 512
    assert any("_anima_te.npz" in notice for notice in project.notices)
    _, whole, _ = project.encode(long_captions="whole")
    assert rows(whole)[1] == 601
    assert any("1_anima_te.npz: cut off at 512 tokens" in notice for notice in project.notices)


def test_limits_and_whole_captions_exclude_each_other(project):
    for name in ("qwen3_max_token_length", "t5_max_token_length"):
        with pytest.raises(UserError, match="long_captions whole"):
            project.options(long_captions="whole", **{name: 300})
    with pytest.raises(UserError, match="cut, whole"):
        project.options(long_captions="all")


def log_losses(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        kind: [r["loss"] for r in records if r.get("kind") == kind]
        for kind in ("step", "validation")
    }


def test_training_on_long_captions_cached_and_live(tmp_path):
    """Batches that mix lengths, with validation: live captions give what cached ones give."""
    from anima_fast.training.loop import train

    world = make_world(tmp_path, subset="validation_split = 0.2")
    for i in (0, 1):
        (tmp_path / "images" / f"image{i}.txt").write_text(LONG[: 1500 + 900 * i])
    runs = {}
    for name, changes in {
        "cached": {},
        "live": {"cache_text_encoder_outputs": False, "network_train_unet_only": True},
        "adapter": {"network_args": ("train_llm_adapter=True",)},
        "encoder": {"cache_text_encoder_outputs": False},
        "cut": {"long_captions": "cut"},
    }.items():
        out = tmp_path / name
        options = {"long_captions": "whole", "max_train_epochs": 1, **changes}
        train(train_options(world, out, **options))
        runs[name] = log_losses(out)
        long = json.loads((out / "dataset.json").read_text())["captions"]["long"]
        assert [entry["file"].rpartition("image")[2] for entry in long] == ["1.txt", "0.txt"]
        assert all(entry["tokens"] > 512 for entry in long)
    cached = runs["cached"]
    assert len(cached["step"]) >= 2 and cached["validation"]
    for kind in ("step", "validation"):
        assert runs["live"][kind] == pytest.approx(cached[kind], rel=1e-5)
    # The first step sees the same weights whatever is trained beside the DiT.
    for name in ("adapter", "encoder"):
        assert runs[name]["step"][0] == pytest.approx(cached["step"][0], rel=1e-5)
    assert runs["cut"]["step"] != pytest.approx(cached["step"], rel=1e-5)
