"""Batches: padding, randomness that depends on its arguments only, masks, the thread ahead."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from encode_fakes import CAPTIONS, WIDTH, Project, install, picture

from anima_fast.data.batches import Batches, StateInputs, in_steps, pad_contexts, pad_states
from anima_fast.data.cache import TextEntry
from anima_fast.errors import UserError


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Project(tmp_path, install(monkeypatch))


def batches(project, seed=5, **more):
    plan, encoded, options = project.encode(**more)
    return Batches(plan, encoded, options, seed)


def contexts(entry):
    return entry.get().context


def test_contexts_are_padded_to_the_longest(project):
    plan, encoded, options = project.encode()
    batch = Batches(plan, encoded, options, 5).load([1, 2], epoch=1, step=0)
    assert batch.text.context.shape == (2, 6, WIDTH) and batch.text.zero_keys == 506
    assert torch.equal(batch.text.context[0, :3], contexts(encoded.texts[1][0]))
    assert not batch.text.context[0, 3:].any() and batch.text.context[1, 5].any()
    assert batch.latents.shape == (2, 16, 8, 8) and batch.latents.dtype == torch.float32
    assert batch.pixels is None and batch.masks is None
    assert [item.index for item in batch.items] == [1, 2]


def test_more_rows_than_512():
    """The long text has no zero keys; the short one shall see 512 rows of the 600."""
    long = TextEntry(context=torch.ones(600, 4))
    text = pad_contexts([long, TextEntry(context=torch.ones(2, 4))])
    assert text.context.shape == (2, 600, 4) and text.zero_keys == (0, 512 - 600)


def test_padded_batch_equals_each_sample_alone_and_512_rows():
    from anima_fast.models.dit import AnimaDiT, DitConfig

    torch.manual_seed(0)
    config = DitConfig(
        model_channels=32, num_blocks=2, num_heads=2, head_dim=16, context_dim=12, adaln_rank=8,
        mlp_hidden=64,
    )  # fmt: skip
    dit = AnimaDiT(config).double().eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    entries = [TextEntry(context=torch.randn(s, 12).double()) for s in (3, 9, 1)]
    x, sigma = torch.randn(3, 16, 4, 6).double(), torch.tensor([0.2, 0.5, 0.9]).double()
    text = pad_contexts(entries)
    with torch.no_grad():
        together = dit(x, sigma, text.context, zero_keys=text.zero_keys)
        for i, entry in enumerate(entries):
            full = torch.zeros(1, 512, 12).double()
            full[0, : len(entry.context)] = entry.context
            padded = dit(x[i : i + 1], sigma[i : i + 1], full)
            torch.testing.assert_close(together[i : i + 1], padded, rtol=1e-5, atol=1e-6)
            without = dit(x[i : i + 1], sigma[i : i + 1], entry.context[None])
            assert (without - padded).abs().max() > 1e-3


def test_states_are_padded_with_masks():
    entries = [
        TextEntry(source_states=torch.ones(2, 4), t5_ids=torch.tensor([7, 8, 1])),
        TextEntry(source_states=torch.ones(0, 4), t5_ids=torch.tensor([1])),
    ]
    text = pad_states(entries)
    assert text.source_mask.tolist() == [[1, 1], [0, 0]] and text.source_states.shape == (2, 2, 4)
    assert text.t5_ids.tolist() == [[7, 8, 1], [1, 0, 0]]
    assert text.t5_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    alone = pad_states(entries[1:])
    assert alone.source_states.shape == (1, 1, 4) and alone.source_mask.tolist() == [[0]]


def test_dropout_uses_the_empty_encoding_at_its_rate(project):
    project.subset = "caption_dropout_rate = 0.3"
    plan, encoded, options = project.encode()
    loader = Batches(plan, encoded, options, 5)
    empty = contexts(encoded.empty_text)[0]

    def dropped(loader, epoch):
        rows = [loader.load([2], epoch=epoch, step=s).text.context[0] for s in range(200)]
        return [len(row) == 1 and torch.equal(row[0], empty) for row in rows]

    first = dropped(loader, 1)
    assert 35 <= sum(first) <= 85
    assert dropped(Batches(plan, encoded, options, 5), 1) == first
    assert dropped(loader, 2) != first
    assert dropped(Batches(plan, encoded, options, 6), 1) != first


def test_dropout_every_n_epochs(project):
    project.subset = "caption_dropout_every_n_epochs = 3"
    loader = batches(project)
    lengths = [loader.load([2], epoch=e, step=0).text.context.shape[1] for e in range(1, 7)]
    assert lengths == [6, 6, 1, 6, 6, 1]


def test_variants_and_flips_are_chosen_by_the_place_in_the_run(project):
    project.subset = "shuffle_caption = true\nflip_aug = true"
    (project.images / "0.txt").write_text("a, b c, d e f, g", encoding="utf-8")
    plan, encoded, options = project.encode(caption_variants=4)
    known = [contexts(stored) for stored in encoded.texts[0]]
    latents = encoded.latents[0].get()

    def choices(seed, epoch):
        loader = Batches(plan, encoded, options, seed)
        found = []
        for step in range(60):
            batch = loader.load([0, 0], epoch=epoch, step=step)
            for i in (0, 1):
                which = [torch.equal(batch.text.context[i], c) for c in known].index(True)
                flipped = torch.equal(batch.latents[i], latents.latents_flipped)
                assert flipped or torch.equal(batch.latents[i], latents.latents)
                found.append((which, flipped))
        return found

    first = choices(5, 1)
    assert {which for which, _ in first} == {0, 1, 2, 3}
    assert 35 <= sum(flipped for _, flipped in first) <= 85
    # The same image twice in a batch is two draws.
    assert any(first[i] != first[i + 1] for i in range(0, 120, 2))
    assert choices(5, 1) == first and choices(5, 2) != first and choices(6, 1) != first


def test_validation_has_nothing_random(project):
    project.subset = "shuffle_caption = true\nflip_aug = true\ncaption_dropout_rate = 0.9"
    project.dataset = "validation_split = 0.5"
    loader = batches(project)
    loaded = [loader.load([0, 1], epoch=e, step=s, validation=True) for e in (1, 2) for s in (0, 1)]
    for batch in loaded[1:]:
        assert torch.equal(batch.latents, loaded[0].latents)
        assert torch.equal(batch.text.context, loaded[0].text.context)
    assert loaded[0].text.context.shape[1] > 1


def test_states_mode_batch(project):
    loader = batches(project, network_args=("train_llm_adapter=True",))
    text = loader.load([0, 2], epoch=1, step=0).text
    assert isinstance(text, StateInputs)
    assert text.source_states.shape == (2, 5, WIDTH) and text.t5_ids.shape == (2, 6)


def test_loss_weights(project):
    loader = batches(project)
    loader._plan.items[1] = dataclasses.replace(loader._plan.items[1], loss_weight=0.25)
    assert loader.load([0, 1], epoch=1, step=0).loss_weights.tolist() == [1.0, 0.25]


def test_alpha_mask_follows_the_flip(project):
    project.subset = "alpha_mask = true\nflip_aug = true"
    picture(project.images / "0.png", 80, alpha=255)
    loader = batches(project)
    latents = loader._encoded.latents[0].get().latents
    seen = set()
    for step in range(20):
        batch = loader.load([0, 1], epoch=1, step=step)
        assert batch.masks.shape == (2, 1, 64, 64) and batch.masks.dtype == torch.float32
        flipped = not torch.equal(batch.latents[0], latents)
        left, right = batch.masks[0, 0, 0, 0].item(), batch.masks[0, 0, 0, -1].item()
        assert (left, right) == ((1, 0) if flipped else (0, 1))
        assert (batch.masks[1] == 1).all()
        seen.add(flipped)
    assert seen == {True, False}


def test_mask_files(project):
    project.subset = f"conditioning_data_dir = '{(project.root / 'masks').as_posix()}'"
    for i in range(len(CAPTIONS)):
        picture(project.root / "masks" / f"{i}.png", 0 if i else 255)
    masks = batches(project, masked_loss=True).load([0, 1], epoch=1, step=0).masks
    assert masks[0, 0, 0].unique().tolist() == [0, 1] and masks[0, 0, 0, 0] == 0
    assert masks[1, 0, 0, 0] == 1


def test_live_pixels_are_augmented_alike_in_every_run(project):
    project.subset = "flip_aug = true\nrandom_crop = true\ncolor_aug = true\nalpha_mask = true"
    project.settings = {}
    gradient = np.arange(96, dtype=np.uint8)[None, :, None] * np.ones((96, 1, 4), np.uint8)
    from PIL import Image

    Image.fromarray(gradient * 2).save(project.images / "0.png")
    project.dataset = "enable_bucket = true\nbucket_no_upscale = true\nbucket_reso_steps = 16"
    loader = batches(project)
    first = [loader.load([0], epoch=1, step=s) for s in range(12)]
    assert first[0].latents is None and first[0].pixels.shape == (1, 3, 64, 64)
    again = batches(project)
    for step, batch in enumerate(first):
        assert torch.equal(batch.pixels, again.load([0], epoch=1, step=step).pixels)
        # Alpha is a copy of the pixels here, so both must have been cut and mirrored alike.
        alpha = batch.masks[0, 0] * 2 - 1
        assert (alpha - batch.pixels[0, 0]).abs().max() < 0.1
    directions = {bool(b.pixels[0, 0, 0, 0] < b.pixels[0, 0, 0, -1]) for b in first}
    assert directions == {True, False}


def test_live_captions_warm_up_with_optimizer_steps(project):
    project.settings = {}
    project.subset = "token_warmup_step = 4\ntoken_warmup_min = 1"
    (project.images / "0.txt").write_text("a, b, c, d, e", encoding="utf-8")
    loader = batches(project, gradient_accumulation_steps=2, max_train_epochs=9)
    assert loader._plan.batches_per_epoch == 2
    tags = [
        loader.load([0], epoch=e, step=s).text.captions[0].count(",") + 1
        for e in range(1, 6)
        for s in (0, 1)
    ]
    assert tags == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_iterate_gives_what_load_gives(project):
    project.subset = "flip_aug = true\ncaption_dropout_rate = 0.5\nnum_repeats = 5"
    loader = batches(project)
    order = loader._plan.epoch_batches(1, 5)
    whole = [(b.latents, b.text.context) for b in loader.iterate(order, epoch=1)]
    rest = [(b.latents, b.text.context) for b in loader.iterate(order[3:], epoch=1, first_step=3)]
    assert len(whole) == len(order) == 10
    for (a, c), (b, d) in zip(whole[3:], rest, strict=True):
        assert torch.equal(a, b) and torch.equal(c, d)


def test_iterate_is_one_ahead_and_ends_its_thread(project):
    loader = batches(project)
    started, original = [], loader.load
    loader.load = lambda indices, **k: started.append(k["step"]) or original(indices, **k)
    before = set(threading.enumerate())
    running = loader.iterate([[0], [1], [2], [3]], epoch=1)
    assert started == []
    next(running)
    running.close()
    assert started == [0, 1]
    assert set(threading.enumerate()) - before == set()


def test_steps_get_their_batches_and_how_long_they_waited():
    def slowly():
        for batch in range(5):
            time.sleep(0.02)
            yield batch

    steps = []
    for batches, wait_s in in_steps(slowly(), 2):
        steps.append(batches)
        assert wait_s >= 0.02 * len(batches)
    assert steps == [[0, 1], [2, 3], [4]]


def test_error_comes_in_the_place_of_its_batch(project):
    loader = batches(project, cache_latents_to_disk=True)
    loader._encoded.latents[2].path.unlink()
    got = []
    with pytest.raises(UserError, match=r"2-.*latents"):
        for batch in loader.iterate([[0], [1], [2], [3]], epoch=1):
            got.append(batch.items[0].index)
    assert got == [0, 1]
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("to_disk", [False, True])
def test_memory_and_disk_give_the_same(project, to_disk):
    plan, encoded, options = project.encode(cache_latents_to_disk=to_disk)
    stored = encoded.latents[0]
    assert (stored.get() is stored.get()) == (not to_disk)
    batch = Batches(plan, encoded, options, 5).load([0, 1], epoch=1, step=0)
    assert torch.equal(batch.latents[0], stored.get().latents)
