"""The encoding phases on real (tiny, random) models, against direct calls of these models."""

import weakref

import pytest
import torch
from stack import make_world, train_options

from anima_fast.data import captions, images
from anima_fast.data.batches import Batches
from anima_fast.data.encode import encode_dataset
from anima_fast.data.plan import build_plan
from anima_fast.models import llm_adapter, text_encoder, tokenizers, vae_checkpoint
from anima_fast.models.dit import load_dit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), subset="shuffle_caption = true")


def encode(world, output, **more):
    options = train_options(world, output, caption_variants=3, vae_batch_size=2, **more)
    plan = build_plan(options)
    return plan, encode_dataset(plan, options, text_dtype=torch.float32), options


def test_entries_equal_direct_calls(world, tmp_path):
    plan, encoded, options = encode(world, tmp_path)
    model = vae_checkpoint.load_vae(options.vae, dtype=torch.float32)
    for item, stored in zip(plan.items, encoded.latents, strict=True):
        pixels, _ = images.load_item(item)
        direct = model.encode(torch.from_numpy(pixels)[None])[0]
        torch.testing.assert_close(stored.get().latents, direct, rtol=1e-4, atol=1e-5)
    encoder = text_encoder.load_text_encoder(options.qwen3, dtype=torch.float32)
    adapter = llm_adapter.load_llm_adapter(
        options.pretrained_model_name_or_path, dtype=torch.float32
    )
    tokens = tokenizers.load_tokenizers(options.qwen3, t5_tokenizer_path=options.t5_tokenizer_path)

    def direct_context(text):
        batch = tokens.encode([text])
        states = encoder(batch.qwen_ids, batch.qwen_mask)
        return adapter(batch.t5_ids, batch.t5_mask, states, batch.qwen_mask)[0]

    with torch.no_grad():
        for item, variants in zip(plan.items, encoded.texts, strict=True):
            texts = captions.variants(item.caption, item.subset, 3, 0)
            assert len(variants) == len(texts) == 3
            for text, stored in zip(texts, variants, strict=True):
                torch.testing.assert_close(
                    stored.get().context, direct_context(text), rtol=1e-4, atol=1e-5
                )
        empty = encoded.empty_text.get().context
        torch.testing.assert_close(empty, direct_context(""), rtol=1e-4, atol=1e-5)
        assert len(empty) == 1


def test_a_batch_goes_through_the_dit_like_the_padded_form(world, tmp_path):
    plan, encoded, options = encode(world, tmp_path)
    dit = load_dit(options.pretrained_model_name_or_path, dtype=torch.float32)
    indices = next(batch for batch in plan.epoch_batches(1, 0) if len(batch) == 2)
    batch = Batches(plan, encoded, options, 0).load(indices, epoch=1, step=0)
    sigma = torch.tensor([0.3, 0.8])
    rows, zero_keys = batch.text.context, batch.text.zero_keys
    with torch.no_grad():
        ours = dit(batch.latents, sigma, rows, zero_keys=zero_keys)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, 512 - rows.shape[1]))
        expected = dit(batch.latents, sigma, padded)
    assert zero_keys == 512 - rows.shape[1]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_second_run_loads_nothing_and_first_run_frees_everything(world, tmp_path, monkeypatch):
    loaded = []
    for module, name in (
        (vae_checkpoint, "load_vae"),
        (text_encoder, "load_text_encoder"),
        (llm_adapter, "load_llm_adapter"),
    ):  # fmt: skip
        real = getattr(module, name)

        def load(*args, real=real, **keywords):
            model = real(*args, **keywords)
            loaded.append(weakref.ref(model))
            return model

        monkeypatch.setattr(module, name, load)
    own = {"cache_dir": str(tmp_path / "cache")}
    encode(world, tmp_path, **own)
    assert [ref() for ref in loaded] == [None, None, None]
    loaded.clear()
    encode(world, tmp_path, **own)
    assert loaded == []
