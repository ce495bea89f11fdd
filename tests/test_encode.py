"""The encoding phases: what is encoded again and what is not, interruption, bad values, memory."""

import os

import numpy as np
import pytest
import torch
from encode_fakes import CAPTIONS, WIDTH, FakeTokenizers, Project, install, picture
from PIL import Image
from safetensors import safe_open

from anima_fast.data.batches import Batches
from anima_fast.errors import UserError


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Project(tmp_path, install(monkeypatch))


def counts(project):
    return {name: project.work.count[name] for name in ("vae", "encoder")}


def test_second_run_loads_no_model(project):
    project.encode()
    # Four captions and the empty one.
    assert counts(project) == {"vae": 4, "encoder": 5}
    first = [path.read_bytes() for path in project.cache_files("*")]
    project.encode()
    assert not project.work.loads
    assert [path.read_bytes() for path in project.cache_files("*")] == first
    assert project.notices == []


def test_models_are_freed_and_never_together(project):
    _, encoded, _ = project.encode()
    assert len(project.work.alive) == 3 and encoded.latents
    assert [ref() for ref in project.work.alive] == [None] * 3


@pytest.mark.parametrize("to_disk", [False, True])
def test_edited_caption_is_encoded_alone(project, to_disk):
    flags = {"cache_latents_to_disk": to_disk, "cache_text_encoder_outputs_to_disk": to_disk}
    project.encode(**flags)
    (project.images / "1.txt").write_text("a large dog", encoding="utf-8")
    _, encoded, _ = project.encode(**flags)
    assert counts(project) == {"vae": 0, "encoder": 1}
    assert encoded.texts[1][0].get().context.shape == (4, WIDTH)


def test_edited_image_is_encoded_alone(project):
    _, before, _ = project.encode()
    picture(project.images / "2.png", 7)
    _, after, _ = project.encode()
    assert counts(project) == {"vae": 1, "encoder": 0}
    changed = [
        not torch.equal(a.get().latents, b.get().latents)
        for a, b in zip(before.latents, after.latents, strict=True)
    ]
    assert changed == [False, False, True, False]


def test_touched_and_renamed_folder_cost_no_encoding(project):
    project.encode()
    os.utime(project.images / "0.png", (1, 1))
    project.images.rename(project.root / "moved")
    project.images = project.root / "moved"
    project.encode()
    assert not project.work.loads


def test_other_model_files_flip_and_size_are_other_keys(project):
    project.encode()
    (project.root / "vae.safetensors").write_bytes(b"another VAE")
    project.encode()
    assert counts(project) == {"vae": 4, "encoder": 0}
    project.subset = "flip_aug = true"
    project.encode()
    assert counts(project) == {"vae": 8, "encoder": 0}
    (project.root / "qwen3.safetensors").write_bytes(b"another encoder")
    project.encode()
    assert counts(project) == {"vae": 0, "encoder": 5}
    (project.root / "dit_adapter.safetensors").write_bytes(b"another adapter")
    project.encode()
    assert counts(project) == {"vae": 0, "encoder": 5}
    project.encode(text_dtype=torch.bfloat16)
    assert counts(project) == {"vae": 0, "encoder": 5}
    project.dataset = "resolution = 128"
    project.encode()
    assert counts(project) == {"vae": 8, "encoder": 0}


def test_interrupted_latents_go_on_where_they_stopped(project):
    project.work.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        project.encode()
    assert len(project.cache_files("latents")) == 2
    assert [ref() for ref in project.work.alive if ref() is not None] == []
    project.work.fail_after = None
    project.encode()
    assert counts(project) == {"vae": 2, "encoder": 5}


def test_interrupted_captions_go_on_where_they_stopped(project):
    project.encode(cache_text_encoder_outputs=False)
    project.work.fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        project.encode()
    assert len(project.cache_files("text")) == 4
    project.work.fail_after = None
    project.encode()
    assert counts(project) == {"vae": 0, "encoder": 1}


@pytest.mark.parametrize("ending", ["latents", "text"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
@pytest.mark.parametrize("to_disk", [False, True])
def test_damaged_cache_file_is_encoded_anew(project, ending, damage, to_disk):
    flags = {"cache_latents_to_disk": to_disk, "cache_text_encoder_outputs_to_disk": to_disk}
    project.encode(**flags)
    path = project.cache_files(ending)[1]
    whole = path.read_bytes()
    new = {"cut": whole[:-9], "garbage": b"\x07" * len(whole), "empty": b""}[damage]
    path.write_bytes(new)
    _, encoded, _ = project.encode(**flags)
    about = [notice for notice in project.notices if path.name in notice]
    assert len(about) == 1 and "encoded again" in about[0]
    assert sum(counts(project).values()) == 1
    assert len(path.read_bytes()) == len(whole)
    assert all(torch.isfinite(s.get().latents).all() for s in encoded.latents)


def test_damaged_file_of_the_output_folder_is_written_next_to_its_image(project):
    (project.images / ".anima_cache").write_text("in the way")
    project.encode()
    (project.images / ".anima_cache").unlink()
    for path in (project.root / "out" / "cache").glob("*.safetensors"):
        path.write_bytes(b"")
    _, encoded, _ = project.encode()
    assert counts(project) == {"vae": 4, "encoder": 5}
    assert len(project.cache_files("latents")) == len(encoded.latents) == 4


def test_skip_cache_check_does_not_open_files(project):
    flags = {"cache_latents_to_disk": True, "skip_cache_check": True}
    plan, encoded, options = project.encode(**flags)
    encoded.latents[0].path.write_bytes(b"")
    plan, encoded, options = project.encode(**flags)
    assert not project.work.loads
    with pytest.raises(UserError, match=r"0-.*delete it and run again"):
        Batches(plan, encoded, options, 0).load([0], epoch=1, step=0)


def test_values_shapes_and_metadata(project):
    project.subset = "flip_aug = true\nalpha_mask = true"
    picture(project.images / "0.png", 80, alpha=128)
    _, encoded, _ = project.encode(cache_latents_to_disk=True)
    entry = encoded.latents[0].get()
    assert entry.latents.shape == (16, 8, 8) and entry.latents.dtype == torch.float32
    torch.testing.assert_close(entry.latents_flipped, entry.latents.flip(-1))
    assert entry.alpha_mask.dtype == torch.uint8
    assert entry.alpha_mask[0, 0] == 0 and entry.alpha_mask[0, -1] == 128
    with safe_open(encoded.latents[0].path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "anima_fast.latents" and metadata["image"] == "0.png"
    assert metadata["bucket"] == "64x64" and metadata["vae"] == "vae.safetensors"
    with safe_open(encoded.texts[1][0].path, "pt") as file:
        assert file.metadata()["caption"] == "a dog" and file.metadata()["form"] == "context"


def test_batches_of_a_bucket_and_chunk_rows(project):
    picture(project.images / "4.png", 60, (128, 32))
    (project.images / "4.txt").write_text("wide", encoding="utf-8")
    project.dataset = "enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16"
    project.encode(vae_batch_size=3, vae_chunk_size=16)
    assert sorted(project.work.batches) == [1, 1, 3]
    assert project.work.chunk_rows == {16}


def test_context_has_real_rows_and_batching_does_not_change_it(project):
    _, alone, _ = project.encode(text_encoder_batch_size=1)
    for path in project.cache_files("text"):
        path.unlink()
    _, together, _ = project.encode(text_encoder_batch_size=5)
    lengths = [len(stored[0].get().context) for stored in alone.texts]
    assert lengths == [len(caption.split()) + 1 for caption in CAPTIONS]
    for a, b in zip(alone.texts, together.texts, strict=True):
        torch.testing.assert_close(a[0].get().context, b[0].get().context)
    assert alone.empty_text.get().context.shape == (1, WIDTH)


def test_half_precision_that_overflows_is_done_again_in_fp32(project):
    Image.new("RGB", (64, 64)).save(project.images / "0.png")
    _, encoded, _ = project.encode(vae_dtype=torch.bfloat16)
    assert project.work.loads["vae"] == 2 and counts(project)["vae"] == 5
    assert torch.isfinite(encoded.latents[0].get().latents).all()


def test_latents_that_are_not_finite_are_reported_and_not_cached(project):
    Image.new("RGB", (64, 64)).save(project.images / "2.png")
    project.work.always_nan = True
    with pytest.raises(UserError, match=r"stage: image encoding.*2\.png"):
        project.encode()
    assert [path.name[0] for path in project.cache_files("latents")] == ["0", "1", "3"]


def test_encoding_that_is_not_finite_is_reported_and_not_cached(project):
    project.work.poison = FakeTokenizers()._words("dog")[0]
    with pytest.raises(UserError, match=r"stage: Qwen3 text encoder.*'a dog'"):
        project.encode(text_encoder_batch_size=1)
    with safe_open(project.cache_files("text")[0], "pt") as file:
        assert file.metadata()["caption"] != "a dog"


def test_states_for_a_trained_adapter(project):
    _, encoded, _ = project.encode(network_args=("train_llm_adapter=True",))
    assert encoded.text_mode == "states" and project.work.loads["adapter"] == 0
    entry = encoded.texts[0][0].get()
    assert entry.context is None and entry.source_states.shape == (3, WIDTH)
    assert entry.t5_ids.shape == (4,) and entry.t5_ids[-1] == 1
    empty = encoded.empty_text.get()
    assert empty.source_states.shape == (0, WIDTH) and empty.t5_ids.tolist() == [1]


def test_live_modes_encode_nothing(project):
    _, encoded, _ = project.encode(cache_latents=False, cache_text_encoder_outputs=False)
    assert (encoded.image_mode, encoded.text_mode) == ("live", "live")
    assert not project.work.loads and not (project.images / ".anima_cache").exists()


def test_shuffled_captions_are_cached_in_variants(project):
    (project.images / "0.txt").write_text("a, b, c, d", encoding="utf-8")
    project.subset = "shuffle_caption = true"
    _, encoded, _ = project.encode(caption_variants=5)
    assert [len(variants) for variants in encoded.texts] == [5, 1, 1, 1]
    assert counts(project)["encoder"] == 5 + 3 + 1
    # Another seed finds the same renderings.
    project.encode(caption_variants=5, seed=99)
    assert not project.work.loads


def test_missing_adapter_is_an_error(project):
    (project.root / "dit.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="--llm_adapter_path"):
        project.encode(pretrained_model_name_or_path=str(project.root / "dit.safetensors"))


def test_token_warmup_is_refused(project):
    project.subset = "token_warmup_step = 10"
    with pytest.raises(UserError, match="token_warmup_step"):
        project.encode()


def test_long_captions_are_named(project):
    project.encode(qwen3_max_token_length=4, t5_max_token_length=4)
    long = [notice for notice in project.notices if "cut off" in notice]
    assert len(long) == 1
    assert "1 caption has more than 4 tokens" in long[0] and "2.txt: 6, 2 lost" in long[0]


def test_unwritable_image_folder_falls_back_to_the_output_folder(project):
    # A file in the place of the folder stops every user, root included.
    (project.images / ".anima_cache").write_text("in the way")
    project.encode()
    about = [notice for notice in project.notices if "cannot be written" in notice]
    assert len(about) == 1
    assert len(list((project.root / "out" / "cache").glob("*.latents.safetensors"))) == 4
    project.encode()
    assert not project.work.loads


def test_cache_dir_holds_everything(project):
    project.encode(cache_dir=str(project.root / "elsewhere"))
    assert not (project.images / ".anima_cache").exists()
    assert len(list((project.root / "elsewhere").glob("*.safetensors"))) == 9


def test_validation_items_are_encoded(project):
    project.dataset = "validation_split = 0.5"
    plan, encoded, options = project.encode()
    assert len(encoded.latents) == len(encoded.validation_latents) == 2
    batch = Batches(plan, encoded, options, 0).load([1], epoch=1, step=0, validation=True)
    assert torch.equal(batch.latents[0], encoded.validation_latents[1].get().latents)


def legacy_latents(project, index, value=0.5, shape=(16, 8, 8), **more):
    array = np.full(shape, value, np.float32)
    path = project.images / f"{index}_0064x0064_anima.npz"
    np.savez(path, **{"latents_8x8": array, "original_size_8x8": np.array([64, 64]), **more})
    return path


@pytest.mark.parametrize("shape", [(16, 8, 8), (16, 1, 8, 8)])
@pytest.mark.parametrize("to_disk", [False, True])
def test_sd_scripts_latents_are_used(project, shape, to_disk):
    for i in range(4):
        legacy_latents(project, i, value=i, shape=shape)
    os.utime(project.images / "3.png", (4e9, 4e9))
    plan, encoded, options = project.encode(cache_latents_to_disk=to_disk)
    assert project.work.loads["vae"] == 0
    batch = Batches(plan, encoded, options, 0).load([2, 3], epoch=1, step=0)
    assert batch.latents.shape == (2, 16, 8, 8)
    assert batch.latents[0].unique().tolist() == [2.0]
    about = [notice for notice in project.notices if "_anima.npz" in notice]
    assert len(about) == 1 and about[0].startswith("4 latents") and "1 images are newer" in about[0]


def test_sd_scripts_latents_that_do_not_fit_are_encoded(project):
    legacy_latents(project, 0, value=np.nan)
    (project.images / "1_0064x0064_anima.npz").write_bytes(b"PK broken")
    legacy_latents(project, 2, shape=(16, 4, 4))
    legacy_latents(project, 3)
    project.subset = ""
    project.encode()
    assert counts(project)["vae"] == 3
    assert any("3 latent files are encoded again" in notice for notice in project.notices)


def test_sd_scripts_latents_of_images_that_are_turned_here_are_encoded(project):
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(project.images / "0.png") as image:
        image.save(project.images / "0.png", exif=exif)
    for i in range(4):
        legacy_latents(project, i)
    project.subset = "exif_rotation = true"
    project.encode()
    assert counts(project)["vae"] == 1


def test_sd_scripts_latents_need_the_mirrored_ones_with_flip(project):
    project.subset = "flip_aug = true\nalpha_mask = true"
    extra = {
        "latents_flipped_8x8": np.ones((16, 8, 8), np.float32),
        "alpha_mask_8x8": np.full((64, 64), 0.5, np.float32),
    }
    legacy_latents(project, 0, **extra)
    legacy_latents(project, 1)
    _, encoded, _ = project.encode()
    assert counts(project)["vae"] == 6
    entry = encoded.latents[0].get()
    assert entry.latents_flipped.unique().tolist() == [
        1.0
    ] and entry.alpha_mask.unique().tolist() == [128]


def legacy_text(project, index, caption, width=WIDTH, **more):
    tokens = FakeTokenizers().encode([caption])

    def padded(row, dtype):
        out = np.zeros(512, dtype)
        out[: row.numel()] = row.numpy()
        return out

    states = np.zeros((512, width), np.float32)
    states[: int(tokens.qwen_mask.sum())] = 0.25
    np.savez(
        project.images / f"{index}_anima_te.npz",
        prompt_embeds=states,
        attn_mask=padded(tokens.qwen_mask[0], np.int64),
        t5_input_ids=padded(tokens.t5_ids[0], np.int32),
        t5_attn_mask=padded(tokens.t5_mask[0], np.int32),
        **more,
    )


@pytest.mark.parametrize("mode", ["context", "states"])
def test_sd_scripts_text_is_used(project, mode):
    for i, caption in enumerate(CAPTIONS):
        # Newer versions store a dropout rate, which means nothing here.
        more = {"caption_dropout_rate": np.float32(0.9)} if i else {}
        legacy_text(project, i, caption if i != 3 else "an older caption", **more)
    more = {"network_args": ("train_llm_adapter=True",)} if mode == "states" else {}
    _, encoded, _ = project.encode(**more)
    # The edited caption, and "" which sd-scripts does not store.
    assert counts(project)["encoder"] == 2
    entry = encoded.texts[0][0].get()
    if mode == "states":
        assert entry.source_states.unique().tolist() == [0.25] and len(entry.source_states) == 3
    else:
        own = torch.cos(FakeTokenizers().encode(["a red cat"]).t5_ids[0][:, None].float()
                        * torch.arange(1, WIDTH + 1))  # fmt: skip
        torch.testing.assert_close(entry.context, own + 3 * 0.25)
    assert any("1 text files are encoded again (3_anima_te" in n for n in project.notices)
    # The next run needs no model at all.
    project.encode(**more)
    assert not project.work.loads


def test_sd_scripts_text_of_another_encoder_or_damaged_is_encoded(project):
    legacy_text(project, 0, CAPTIONS[0], width=WIDTH + 1)
    (project.images / "1_anima_te.npz").write_bytes(b"PK")
    project.encode()
    assert counts(project)["encoder"] == 5
    assert any("2 text files are encoded again" in notice for notice in project.notices)
