"""Previews: their prompts, their times, that they are what `sample` makes and do no harm."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stack import make_world, records, train_options

from anima_fast.errors import UserError
from anima_fast.options.run import TrainOptions
from anima_fast.options.sample import SampleOptions
from anima_fast.sampling import run_sample
from anima_fast.sampling.prompts import Prompt, parse_prompt, read_prompts
from anima_fast.training import previews
from anima_fast.training.loop import train

SMALL = "a cat, green eyes --n ugly --w 80 --h 64 --s 3 --l 3.5 --fs 2 --d 11"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def pixels(path):
    return np.asarray(Image.open(path))


# Prompts


def test_a_line_with_settings():
    prompt = parse_prompt("one, well--known -- thing --n bad, worse --w 700 --h 65 --l 1 --ss x")
    assert prompt == Prompt("one, well--known -- thing", "bad, worse", 688, 64, cfg=1.0)
    assert prompt.ignored == ("--ss",)
    assert prompt.texts == ("one, well--known -- thing",)
    assert parse_prompt("x --w=64 --H 96 --n =_= --d=3") == Prompt("x", "=_=", 64, 96, 3)
    assert parse_prompt("x --n --w 64") == Prompt("x", "", 64)


def test_what_is_not_given_is_as_in_comfyui():
    assert parse_prompt("x") == Prompt("x", "", 1024, 1024, None, 30, 4.0, 3.0)


def test_files_say_the_same_in_all_forms(tmp_path):
    (tmp_path / "a.txt").write_text(
        "\ufeff# comment\none --w 64 --h 64 --d 3\n\ntwo --w 64 --h 64 --n no --d 4\n",
        encoding="utf-8",
    )
    (tmp_path / "a.toml").write_text(
        '[prompt]\nwidth = 64\nheight = 64\nseed = 3\nnegative_prompt = ""\n'
        '[[prompt.subset]]\nprompt = "one"\n'
        '[[prompt.subset]]\nprompt = "two"\nseed = 4\nnegative_prompt = "no"\n',
        encoding="utf-8",
    )
    listed = [{"prompt": "one", "width": 64, "height": 64, "seed": 3, "scale": None}]
    (tmp_path / "a.json").write_text(
        json.dumps([*listed, "two --w 64 --h 64 --n no --d 4"]), encoding="utf-8"
    )
    expected = [Prompt("one", "", 64, 64, 3), Prompt("two", "no", 64, 64, 4)]
    for suffix in ("txt", "toml", "json"):
        assert read_prompts(tmp_path / f"a.{suffix}") == expected, suffix


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.txt", "x --w wide", r"line 1: --w 'wide' is not a number"),
        ("a.txt", "x\ny --q 3", r"line 2: --q is unknown"),
        ("a.txt", "x --s 0", "out of range"),
        ("a.txt", "x --l nan", "out of range"),
        ("a.txt", "x --w 99999", "at most 16384"),
        ("a.toml", "[prompt", "not valid TOML"),
        ("a.json", '[{"width": 3}]', "prompt is missing"),
        ("a.json", '[{"prompt": "x", "widht": 3}]', "widht is unknown"),
        ("a.json", "[3]", "expected a table or a line"),
        ("a.yaml", "x", "rename it"),
        ("a.txt", "# later\n\n", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.txt", "an embedding:x", "textual inversion"),
    ],
)
def test_wrong_prompts_name_their_place(tmp_path, name, text, match):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=match):
        read_prompts(tmp_path / name)


def test_options_that_need_prompts():
    with pytest.raises(UserError, match="previews need --sample_prompts"):
        TrainOptions(sample_every_n_steps=5)
    options = TrainOptions(sample_prompt=("x",))
    assert options.sample_every_n_epochs == 1
    options = TrainOptions(sample_prompt=("x",), sample_every_n_steps=-1, sample_at_first=True)
    assert (options.sample_every_n_steps, options.sample_every_n_epochs) == (0, 0)
    assert any("sample_every_n_steps -1" in notice for notice in options.notices)


# Runs


def test_when_they_are_made_and_what_they_are_called(world, tmp_path):
    (tmp_path / "p.txt").write_text(f"{SMALL}\nplain --w 64 --h 64 --s 1\n", encoding="utf-8")
    out = tmp_path / "out"
    train(train_options(
        world, out, max_train_epochs=2, sample_prompts=str(tmp_path / "p.txt"),
        sample_every_n_epochs=1, sample_every_n_steps=1, sample_at_first=True,
    ))  # fmt: skip
    found = records(out, "preview")
    steps = records(out, "step")
    per_epoch = len(steps) // 2
    assert [(r["step"], r["epoch"]) for r in found] == [(0, 0), (per_epoch, 1), (2 * per_epoch, 2)]
    names = [name for r in found for name in r["files"]]
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.png")) == sorted(names)
    for name, stage in zip(names[::2], ("000000", "e000001", "e000002"), strict=True):
        assert name.startswith(f"sample/lora_{stage}_00_") and name.endswith("_11.png")
    assert all(n.split("_")[2] == "01" and len(n.split("_")) == 4 for n in names[1::2])
    image = Image.open(out / names[0])
    assert image.size == (80, 64)
    assert "Seed: 11" in image.text["parameters"] and "ugly" in image.text["parameters"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cache_text_encoder_outputs": False, "text_encoder_lr": (1e-3,), "learning_rate": 1e-2},
        {"network_args": ("train_llm_adapter=True", "rank_dropout=0.5"), "network_dropout": 0.3},
        {"network_module": "networks.lokr", "network_args": ("dora_wd=True",)},
        {"cache_latents": False},
        {"optimizer_type": "AdamWScheduleFree"},
        {"blocks_to_swap": 0, "recompute": "block", "kernels": "eager"},
        {"tlora_min_rank": 1},
        {"save_precision": "bf16", "network_module": "networks.loha"},
        {"mixed_precision": "fp16", "kernels": "triton"},
    ],
    ids=[
        "plain",
        "text encoder",
        "adapter, dropout",
        "lokr",
        "live",
        "averaged",
        "block",
        "tlora",
        "saved in bf16",
        "fp16",
    ],
)
def test_a_preview_is_what_sample_makes_with_the_checkpoint(world, tmp_path, given):
    if "AdamWScheduleFree" in str(given):
        pytest.importorskip("schedulefree")
    out = tmp_path / "out"
    options = train_options(
        world, out,
        **{"learning_rate": 0.05, "max_train_epochs": None, "max_train_steps": 2,
           "save_every_n_steps": 1, "sample_prompt": (SMALL,), "sample_every_n_steps": 1, **given},
    )  # fmt: skip
    train(options)
    shown = records(out, "preview")
    assert [r["step"] for r in shown] == [1, 2]
    images = [pixels(out / r["files"][0]) for r in shown]
    assert not np.array_equal(*images)
    for image, name in zip(images, ("lora-step00000001", "lora"), strict=True):
        path = run_sample(
            SampleOptions(
                dit=world["pretrained_model_name_or_path"], qwen3=world["qwen3"], vae=world["vae"],
                t5_tokenizer_path=world["t5_tokenizer_path"],
                lora=(str(out / f"{name}.safetensors"),),
                prompt="a cat, green eyes", negative_prompt="ugly", width=80, height=64, steps=3,
                cfg=3.5, shift=2.0, seed=11, device="cpu",
                dtype=given.get("mixed_precision", "fp32"), kernels=given.get("kernels", "auto"),
                output=str(tmp_path / f"{name}.png"),
            ),
            quiet=True,
        )  # fmt: skip
        # A level of 255 may tip over where sums are made in another order.
        assert np.abs(pixels(path).astype(int) - image).max() <= 1


def test_a_card_rounds_previews_as_sample_does(world, tmp_path, monkeypatch):
    """Neither TF32 nor a search for algorithms nor fused norms, which the run keeps for itself."""
    from anima_fast.models import llm_adapter, vae
    from anima_fast.training import loop

    def switches():
        backends = torch.backends
        return (
            backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
        )  # fmt: skip

    before, seen, adapters = switches(), [], set()
    real, steps, adapt = vae.VAE.decode, loop.forward_backward, llm_adapter.LLMAdapter.forward

    def decode(self, *args, **kwargs):
        seen.append(("picture", *switches()))
        return real(self, *args, **kwargs)

    def group(run, *args, **kwargs):
        run.conditioning.adapter.fuse_norms()
        seen.append(("step", *switches()))
        return steps(run, *args, **kwargs)

    def forward(self, *args):
        norms = {m.fused for m in self.modules() if isinstance(m, llm_adapter.AdapterNorm)}
        adapters.add((torch.is_grad_enabled(), *norms))
        return adapt(self, *args)

    monkeypatch.setattr(vae.VAE, "decode", decode)
    monkeypatch.setattr(loop, "forward_backward", group)
    monkeypatch.setattr(llm_adapter.LLMAdapter, "forward", forward)
    try:
        train(train_options(
            world, tmp_path / "out", max_train_epochs=None, max_train_steps=2,
            sample_prompt=(SMALL,), sample_every_n_steps=1, cuda_allow_tf32=True,
            cuda_cudnn_benchmark=True, network_args=("train_llm_adapter=True",),
        ))  # fmt: skip
        fast, exact = (True,) * 3, (False,) * 3
        assert seen == [("step", *fast), ("picture", *exact)] * 2
        assert adapters == {(True, True), (False, False)} and switches() == fast
        run_sample(
            SampleOptions(
                dit=world["pretrained_model_name_or_path"], qwen3=world["qwen3"], vae=world["vae"],
                t5_tokenizer_path=world["t5_tokenizer_path"], prompt="a cat", width=64, height=64,
                steps=1, cfg=1.0, device="cpu", output=str(tmp_path / "a.png"),
            ),
            quiet=True,
        )  # fmt: skip
        assert seen[-1] == ("picture", *exact)
    finally:
        tf32, convolutions, benchmark = before
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cudnn.benchmark = benchmark


def test_previews_do_not_change_the_run(world, tmp_path):
    given = {"network_dropout": 0.5, "max_train_epochs": 2, "learning_rate": 0.01}
    given |= {"save_precision": "bf16", "save_every_n_epochs": 1}
    train(train_options(world, tmp_path / "a", **given))
    train(train_options(
        world, tmp_path / "b", sample_prompt=(SMALL,), sample_at_first=True,
        sample_every_n_steps=1, **given,
    ))  # fmt: skip
    first, second = (load_file(tmp_path / n / "lora.safetensors") for n in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)
    losses = [[r["loss"] for r in records(tmp_path / n, "step")] for n in "ab"]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), ValueError("odd"), OSError(28)])
def test_a_failed_preview_is_one_warning(world, tmp_path, monkeypatch, capsys, error):
    def fail(*_args):
        raise error

    monkeypatch.setattr(previews, "decode", fail)
    train(train_options(world, tmp_path, sample_prompt=(SMALL,), sample_every_n_epochs=1))
    said = capsys.readouterr().err
    assert said.count("no preview of prompt 1:") == 2
    assert (tmp_path / "lora.safetensors").exists() and not records(tmp_path, "preview")


def test_a_failed_preview_leaves_the_others(world, tmp_path, monkeypatch, capsys):
    real, calls = previews.decode, []

    def fail_first(run, latents):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA")
        return real(run, latents)

    monkeypatch.setattr(previews, "decode", fail_first)
    given = {"sample_prompt": (SMALL, SMALL), "sample_every_n_epochs": 1, "max_train_epochs": 1}
    train(train_options(world, tmp_path, **given))
    assert "no preview of prompt 1: out of memory" in capsys.readouterr().err
    assert [len(r["files"]) for r in records(tmp_path, "preview")] == [1]


def test_a_changed_file_of_prompts(world, tmp_path, monkeypatch, capsys):
    """New settings count at once, a new text waits, a broken file leaves the old prompts."""
    file, versions = tmp_path / "p.txt", [
        "x --w 64 --h 64 --s 1 --d 1\n", "x --w 96 --h 64 --s 1 --d 2\nnew --w 64 --h 64 --s 1\n",
        "x --w broken\n",
    ]  # fmt: skip
    file.write_text(versions[0], encoding="utf-8")
    real, calls = previews.Previews.make, []

    def make(self, *args, **kwargs):
        file.write_text(versions[len(calls)], encoding="utf-8")
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(previews.Previews, "make", make)
    out = tmp_path / "out"
    train(train_options(
        world, out, sample_prompts=str(file), sample_every_n_epochs=1, max_train_epochs=3
    ))  # fmt: skip
    found = [r["files"] for r in records(out, "preview")]
    sizes = [[Image.open(out / name).size for name in files] for files in found]
    assert sizes == [[(64, 64)], [(96, 64)], [(64, 64)]]
    said = capsys.readouterr().err
    assert "1 prompts are new" in said and "the prompts of the start are used" in said


def test_a_missing_file_of_prompts_stops_before_anything_is_encoded(world, tmp_path):
    with pytest.raises(UserError, match="cannot read the prompts"):
        train(
            train_options(world, tmp_path / "o", sample_prompts="absent.txt", sample_at_first=True)
        )
