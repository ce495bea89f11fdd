"""`anima-fast sample` beyond one picture: weights, batches, image to image, grids, chunks."""

import json
import os
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from stack import make_world
from test_lycoris import make_dit
from typer.testing import CliRunner

from anima_fast.adapters.lora import add_lora
from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.models.dit import load_dit
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.models.text_encoder import load_text_encoder
from anima_fast.models.tokenizers import load_tokenizers
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.options.sample import SampleOptions
from anima_fast.sampling import euler, euler_sample, run_sample
from anima_fast.sampling.grid import compose, expand, read_axes
from anima_fast.sampling.pictures import generation_parameters
from anima_fast.sampling.prompts import Job, batches, make_jobs
from anima_fast.sampling.texts import adapt, encode_states, tokenize_prompt, weighted_segments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def loras(world, tmp_path_factory):
    """A LoRA on everything, a LoKr on the DiT."""
    folder = tmp_path_factory.mktemp("loras")
    files = []
    for kind, text in (("lora", True), ("lokr", False)):
        dit = load_dit(world["pretrained_model_name_or_path"], dtype=torch.float32)
        more = {}
        if text:
            path = world["pretrained_model_name_or_path"]
            more["llm_adapter"] = load_llm_adapter(path, dtype=torch.float32)
            more["text_encoder"] = load_text_encoder(world["qwen3"], dtype=torch.float32)
        network = add_lora(dit, kind=kind, rank=2, alpha=2, seed=1, **more)
        with torch.no_grad():
            network.flat.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        files.append(str(folder / f"{kind}.safetensors"))
        network.save(files[-1])
    return files


def options(world, output, **changes):
    values = {
        "dit": world["pretrained_model_name_or_path"], "qwen3": world["qwen3"],
        "vae": world["vae"], "t5_tokenizer_path": world["t5_tokenizer_path"],
        "prompt": "a photograph of a cat", "seed": 5, "steps": 2, "cfg": 1.0, "width": 48,
        "height": 32, "dtype": "fp32", "device": "cpu", "output": str(output), **changes,
    }  # fmt: skip
    return SampleOptions(**values)


def render(world, output, **changes):
    return pixels(run_sample(options(world, output, **changes), quiet=True))


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# Prompt weights


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat) here", [("a ", 1.0), ("cat", 1.1), (" here", 1.0)]),
        ("((cat))", [("cat", 1.21)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(a (cat:0.5) b:2)", [("a ", 2.0), ("cat", 0.5), (" b", 2.0)]),
        ("((cat:1.5))", [("cat", 1.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.5)", [(":1.5", 1.1)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("(cat:nan)", [("cat:nan", 1.1)]),
        (r"fate \(series\), (x)", [("fate (series), ", 1.0), ("x", 1.1)]),
        ("(open", [("(open", 1.0)]),
        ("close) (x)", [("close) (x)", 1.0)]),
        ("a [b] c", [("a [b] c", 1.0)]),
        ("()", []),
        ("", [("", 1.0)]),
    ],
)
def test_weights_are_read_as_comfyui_reads_them(prompt, expected):
    found = weighted_segments(prompt)
    if not expected:
        assert "".join(text for text, _ in found) == ""
        return
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([w for _, w in expected])


def test_parentheses_without_end_are_one_readable_error():
    with pytest.raises(UserError, match="too deeply"):
        weighted_segments("(" * 5000 + "x" + ")" * 5000)


def test_weights_multiply_the_rows_of_their_tokens(world):
    tokenizers = load_tokenizers(world["qwen3"], t5_tokenizer_path=world["t5_tokenizer_path"])
    device = torch.device("cpu")
    encoder = load_text_encoder(world["qwen3"], dtype=torch.float32)
    adapter = load_llm_adapter(world["pretrained_model_name_or_path"], dtype=torch.float32)

    def context(text, **given):
        tokens = tokenize_prompt(tokenizers, text, **given)
        with torch.no_grad():
            return tokens, adapt(tokens, encode_states(tokens, encoder, device), adapter)[0]

    weighted, rows = context("red (cat:1.5) tree")
    parts = ["red ", "cat", " tree"]
    ids = [tokenizers.t5.encode(part, add_special_tokens=False).ids for part in parts]
    qwen = [tokenizers.qwen.encode(part, add_special_tokens=False).ids for part in parts]
    assert weighted.ids.t5_ids[0].tolist() == [*chain(*ids), tokenizers.t5_end]
    assert weighted.ids.qwen_ids[0].tolist() == list(chain(*qwen))
    wanted = [1.0] * len(ids[0]) + [1.5] * len(ids[1]) + [1.0] * (len(ids[2]) + 1)
    assert weighted.weights.tolist() == wanted
    flat = replace(weighted, weights=torch.ones(len(wanted)))
    with torch.no_grad():
        plain = adapt(flat, encode_states(flat, encoder, device), adapter)[0]
    torch.testing.assert_close(rows, plain * torch.tensor(wanted)[:, None])
    off, _ = context("red (cat:1.5) tree", weighted=False)
    assert off.ids.t5_ids.tolist() == tokenizers.encode(["red (cat:1.5) tree"]).t5_ids.tolist()


def test_weights_change_the_picture_unless_they_are_off(world, tmp_path):
    out = tmp_path / "a.png"
    plain, weighted = (render(world, out, prompt=p) for p in ("a cat", "a (cat:3)"))
    assert np.abs(plain - weighted).max() > 0
    text = [render(world, out, prompt=p, no_prompt_weights=True) for p in ("a cat", "a (cat:3)")]
    assert np.array_equal(text[0], plain) and not np.array_equal(text[1], weighted)


# Several pictures


def test_pictures_of_a_batch_are_those_made_alone(world, tmp_path):
    given = {"cfg": 3.0, "negative_prompt": "bad"}
    run_sample(options(world, tmp_path / "a.png", count=3, batch_size=2, **given), quiet=True)
    files = sorted(tmp_path.glob("a_*.png"))
    assert [f.name for f in files] == ["a_0000.png", "a_0001.png", "a_0002.png"]
    for i, file in enumerate(files):
        alone = render(world, tmp_path / "one.png", seed=5 + i, **given)
        assert np.abs(alone - pixels(file)).max() <= 1
        assert f"Seed: {5 + i}" in Image.open(file).text["parameters"]


def test_files_are_numbered_on(world, tmp_path):
    folder = tmp_path / "out"
    for _ in range(2):
        run_sample(options(world, folder, count=2), quiet=True)
    assert sorted(f.name for f in folder.iterdir()) == [f"000{i}.png" for i in range(4)]


def test_a_file_of_prompts(world, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one --w 64 --h 64 --d 1\ntwo --s 1\n", encoding="utf-8")
    run_sample(options(world, tmp_path / "o.png", prompt="", prompts=str(file)), quiet=True)
    images = [Image.open(tmp_path / f"o_000{i}.png") for i in (0, 1)]
    assert [image.size for image in images] == [(64, 64), (48, 32)]
    assert images[0].text["parameters"].startswith("one\n")
    assert "Seed: 1," in images[0].text["parameters"]
    assert "Steps: 1," in images[1].text["parameters"]


def test_neighbours_that_differ_in_more_than_the_seed_are_no_batch():
    job = Job("a", "", 64, 64, 1, 2, 1.0)
    jobs = [job, replace(job, seed=2), replace(job, seed=3), replace(job, steps=3, seed=4)]
    assert [len(b) for b in batches(jobs, 2)] == [2, 1, 1]
    assert [len(b) for b in batches(jobs, 9)] == [3, 1]


# Image to image


def test_strength_is_the_part_of_the_way():
    """As ComfyUI's denoise: int(steps / strength) steps are laid out, the last ones are made."""
    dit = make_dit()
    calls = []

    def model(x, sigma, context, zero_keys=None):
        calls.append(float(sigma[0]))
        return torch.zeros_like(x)

    noise, start = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 16, 1, 4, 4)
    context = torch.zeros(1, 2, dit.config.context_dim)
    out = euler_sample(model, noise, context, steps=3, shift=3.0, start=start, strength=0.4)
    s = torch.linspace(1, 0, 8)
    sigmas = (3 * s / (1 + 2 * s))[-4:]
    assert calls == pytest.approx(sigmas[:-1].tolist())
    torch.testing.assert_close(out, (1 - sigmas[0]) * start + sigmas[0] * noise)


def test_image_to_image_starts_from_the_picture(world, tmp_path):
    source = tmp_path / "in.png"
    gradient = np.linspace(0, 255, 100 * 70 * 3).reshape(70, 100, 3).astype(np.uint8)
    Image.fromarray(gradient).save(source)
    given = {"init_image": str(source), "width": None, "height": None}
    near = render(world, tmp_path / "near.png", strength=0.05, steps=1, **given)
    assert near.shape == (64, 96, 3)
    far = render(world, tmp_path / "far.png", strength=1.0, **given)
    assert np.array_equal(far, render(world, tmp_path / "t.png", width=96, height=64))
    vae = load_vae(world["vae"], dtype=torch.float32)
    from PIL import ImageOps

    fitted = ImageOps.fit(Image.open(source), (96, 64), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.asarray(fitted, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        seen = ((vae.decode(vae.encode(x))[0] + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(near - seen).mean() < np.abs(far - seen).mean()


def test_the_picture_to_start_from_is_never_replaced(world, tmp_path):
    source = tmp_path / "in.png"
    Image.new("RGB", (48, 32)).save(source)
    before = source.read_bytes()
    with pytest.raises(UserError, match="init_image itself"):
        render(world, tmp_path / "x" / ".." / "in.png", init_image=str(source), strength=0.5)
    assert source.read_bytes() == before


def test_a_picture_of_16_bits_is_that_of_8(world, tmp_path):
    levels = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint16)
    pictures = []
    for name, array in (("8", levels.astype(np.uint8)), ("16", levels * 257)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        given = {"init_image": str(tmp_path / f"{name}.png"), "strength": 0.1}
        pictures.append(render(world, tmp_path / "out.png", **given))
    assert np.array_equal(*pictures)


# LoRA files


def test_weights_of_several_files_of_any_kind(world, tmp_path, loras):
    out = tmp_path / "a.png"
    base = render(world, out)
    none = render(world, out, lora=(f"{loras[0]}:0", f"{loras[1]}:0"))
    assert np.abs(base - none).max() <= 1
    one = render(world, out, lora=(f"{loras[1]}:-0.7",))
    both = render(world, out, lora=(f"{loras[1]}:-0.7", f"{loras[0]}:0"))
    assert np.abs(one - both).max() <= 1 and np.abs(one - base).max() > 1
    assert "LoRA: lokr:-0.7; lora:0" in Image.open(out).text["parameters"]
    job = Job("a", "", 64, 64, 1, 2, 1.0, weights=(1.0,))
    assert generation_parameters(job, "m, v2.x", ["a,b.x"]).endswith(
        'Model: "m, v2", LoRA: "a,b:1"'
    )


def test_a_drive_letter_is_no_weight():
    given = SampleOptions(lora=(r"C:\x\y.safetensors", r"C:\x\y.safetensors:0.8"), lora_weight=0.5)
    assert given.loras == ((r"C:\x\y.safetensors", 0.5), (r"C:\x\y.safetensors", 0.8))


def test_sample_and_merge_read_one_word_alike(tmp_path):
    (tmp_path / "v:2").touch()
    (tmp_path / "a.safetensors").touch()
    whole = str(tmp_path / "v:2")
    assert SampleOptions(lora=(whole,)).loras == ((whole, 1.0),)
    for word in ("abc", "nan", "inf"):
        with pytest.raises(UserError, match=r"finite|no number"):
            SampleOptions(lora=(f"{tmp_path / 'a.safetensors'}:{word}",))


# Grids


def test_a_grid_has_a_cell_for_each_pair(world, tmp_path, loras):
    out = tmp_path / "grid.png"
    run_sample(
        options(world, out, lora=(loras[0],), grid=("weight=0,0.5,1", "seed=1,2")), quiet=True
    )
    cells = sorted(tmp_path.glob("grid_*.png"))
    assert len(cells) == 6
    sheet = Image.open(out)
    assert sheet.width > 3 * 48 and sheet.height > 2 * 32
    for i, (seed, weight) in enumerate((s, w) for s in (1, 2) for w in (0, 0.5, 1)):
        alone = render(world, tmp_path / "one.png", seed=seed, lora=(f"{loras[0]}:{weight}",))
        assert np.abs(alone - pixels(cells[i])).max() <= 1, (seed, weight)
    assert f"{cells[0].name}" == "grid_0000.png"
    colours = np.asarray(sheet)
    assert (colours == 255).all(axis=-1).any() and (colours < 60).all(axis=-1).any()


def test_labels_grow_with_the_cells():
    """A sheet of large cells is looked at as a whole."""
    heights = []
    for width in (64, 960):
        sheet = compose([[Image.new("RGB", (width, 64))]], read_axes(["seed=1"], 0, [""]))
        ink = np.asarray(sheet)[:-72].min(axis=(1, 2)) < 128
        heights.append(int(ink.sum()))
    assert heights[1] > 2 * heights[0] > 0


def test_models_are_loaded_once_for_all_cells(world, tmp_path, monkeypatch, loras):
    from anima_fast.sampling import run

    loads = []
    for name in ("load_dit", "load_vae"):
        real = getattr(run, name)
        monkeypatch.setattr(
            run, name, lambda *a, n=name, r=real, **k: loads.append(n) or r(*a, **k)
        )
    run_sample(options(world, tmp_path / "g.png", grid=("seed=1,2,3",)), quiet=True)
    assert sorted(loads) == ["load_dit", "load_vae"]


def test_axes_change_what_they_name(loras):
    job = Job("a cat", "", 64, 64, 1, 2, 1.0, weights=(0.5, 0.7))
    axes = read_axes(["weight2=0,1", "prompt=cat|dog|bird"], 2, ["a cat"])
    rows = expand(job, axes)
    assert [j.weights for j in rows[0]] == [(0.5, 0.0), (0.5, 1.0)]
    assert [row[0].text for row in rows] == ["a cat", "a dog", "a bird"]
    assert rows[1][1].title == "weight2 1, dog"
    files = read_axes(["lora=x.safetensors,y.safetensors"], 1, [""])
    weights = [j.weights for j in expand(replace(job, weights=(0.5, 0.9, 0.9)), files)[0]]
    assert weights == [(0.5, 0.9, 0.0), (0.5, 0.0, 0.9)]
    # Weights for all files leave those out that an axis does not choose, in either order.
    words = ["lora=x.safetensors,y.safetensors", "weight=0.5,1"]
    cells = [[(0.5, 0.0), (0.0, 0.5)], [(1.0, 0.0), (0.0, 1.0)]]
    job = replace(job, weights=(0.9, 0.9))
    rows = expand(job, read_axes(words, 0, ["a cat"]))
    assert [[j.weights for j in row] for row in rows] == cells
    columns = expand(job, read_axes(words[::-1], 0, ["a cat"]))
    assert [[j.weights for j in column] for column in zip(*columns, strict=True)] == cells
    rows = expand(job, read_axes(["weight1=0,1", "weight=0.5"], 2, ["a cat"]))
    assert [j.weights for j in rows[0]] == [(0.0, 0.5), (1.0, 0.5)]
    for word, name, values in (
        ("steps=1,2", "steps", [1, 2]), ("cfg=1,2.5", "cfg", [1.0, 2.5]),
        ("width=64,80", "width", [64, 80]), ("shift=1", "shift", [1.0]),
    ):  # fmt: skip
        (row,) = expand(job, read_axes([word], 0, [""]))
        assert [getattr(j, name) for j in row] == values


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["seed"], "expected name=value"),
        (["seed=1.5"], "not a number of this kind"),
        (["speed=1"], "speed is unknown"),
        (["weight=1"], "needs a --lora"),
        (["weight3=1"], "counted from weight1"),
        (["seed=1", "steps=1", "cfg=1"], "has 3 axes"),
        (["seed=1", "seed=2"], "twice"),
        (["width=65"], "multiple of 16"),
        (["cfg=nan"], "out of range"),
        (["prompt=dog|cat"], "does not contain 'dog'"),
        (["prompt=|cat"], "does not contain ''"),
    ],
)
def test_wrong_grids_are_refused(words, match):
    with pytest.raises(UserError, match=match):
        read_axes(words, 0, ["a cat"])


# Chunks of the PNG


def test_comfyui_finds_its_nodes(world, tmp_path, loras):
    out = tmp_path / "a.png"
    given = {"prompt": "猫 (cat:1.2)", "cfg": 3.5, "shift": 2.0, "lora": (f"{loras[0]}:0.8",)}
    run_sample(options(world, out, **given), quiet=True)
    chunks = Image.open(out).text
    assert chunks["parameters"].startswith("猫 (cat:1.2)\n")
    nodes = json.loads(chunks["prompt"])
    # ComfyUI's page decodes the chunk as UTF-8 and knows no international one.
    assert chunks["prompt"].isascii()
    by_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    sampler = by_kind["KSampler"]
    assert (sampler["seed"], sampler["steps"], sampler["cfg"]) == (5, 2, 3.5)
    assert (sampler["sampler_name"], sampler["scheduler"]) == ("euler", "simple")
    assert by_kind["LoraLoader"]["strength_model"] == 0.8
    assert by_kind["LoraLoader"]["lora_name"] == "lora.safetensors"
    assert by_kind["EmptyLatentImage"]["width"] == 48
    assert by_kind["ModelSamplingAuraFlow"]["shift"] == 2.0
    for node in nodes.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in nodes
    texts = [n["inputs"]["text"] for n in nodes.values() if n["class_type"] == "CLIPTextEncode"]
    assert texts == ["猫 (cat:1.2)", ""]
    run_sample(options(world, out), quiet=True)
    assert "ModelSamplingAuraFlow" not in Image.open(out).text["prompt"]


def test_comfyui_gets_the_size_and_the_parentheses(world, tmp_path):
    """The picture to start from is cut as here; text that was not weighted is escaped."""
    source, out = tmp_path / "in.png", tmp_path / "a.png"
    Image.new("RGB", (100, 70)).save(source)
    given = {"init_image": str(source), "strength": 0.5, "no_prompt_weights": True}
    run_sample(options(world, out, prompt=r"a (cat:2) \(x", **given), quiet=True)
    nodes = json.loads(Image.open(out).text["prompt"]).values()
    (scale,) = (node["inputs"] for node in nodes if node["class_type"] == "ImageScale")
    assert (scale["width"], scale["height"], scale["crop"]) == (48, 32, "center")
    (text, _) = (n["inputs"]["text"] for n in nodes if n["class_type"] == "CLIPTextEncode")
    assert weighted_segments(text) == [(r"a (cat:2) \(x", 1.0)]


def test_what_has_no_effect_is_said(world, tmp_path, capsys):
    source, prompts = tmp_path / "in.png", tmp_path / "p.txt"
    Image.new("RGB", (48, 32)).save(source)
    prompts.write_text("a --ss euler_a --s 1\n", encoding="utf-8")
    given = {"prompt": "", "prompts": str(prompts), "init_image": str(source)}
    run_sample(options(world, tmp_path / "a.png", **given))
    said = " ".join(capsys.readouterr().err.split())
    assert "in the prompts: --ss" in said and "gives its size only" in said


# Refusals


def command(world, *words):
    given = ["--dit", world["pretrained_model_name_or_path"], "--qwen3", world["qwen3"]]
    given += ["--vae", world["vae"], "--t5_tokenizer_path", world["t5_tokenizer_path"]]
    return CliRunner().invoke(app, ["sample", *given, "--device", "cpu", *words])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "--prompt is required"),
        (["--prompt", "embedding:bad"], "textual inversion"),
        (["--prompt", "x", "--strength", "0.5"], "--init_image"),
        (["--prompt", "x", "--strength", "0"], "out of range"),
        (["--prompt", "x", "--init_image", "none.png"], "does not exist"),
        (["--prompt", "x", "--init_image", __file__, "--strength", "0.5"], "is not a readable"),
        (["--prompt", "x", "--controlnet", "c"], "ControlNet"),
        (["--prompt", "x", "--textual_inversion_embeddings", "e"], "textual inversion"),
        (["--prompt", "x", "--output", "a.jpg"], "give the name of a .png file"),
        (["--prompts", "none.txt"], "cannot read the prompts"),
        (["--prompts", os.devnull], "rename it"),
        (["--prompts", "none.txt", "--prompt", "x"], "exclude each other"),
        (["--prompt", "x", "--lora", "a.safetensors:nan"], "must be a finite number"),
        (["--prompt", "x", "--grid", "seed"], "expected name=value"),
        (["--prompt", "x", "--attn_mode", "xformers"], 'pip install "anima-fast[xformers]"'),
    ],
)
def test_bad_input_is_one_line_and_status_2(world, tmp_path, monkeypatch, words, match):
    monkeypatch.chdir(tmp_path)
    result = command(world, *words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert match in result.stderr


def test_sizes_default_to_those_of_the_picture(world):
    given = options(world, "x.png", width=None, height=None)
    (job,) = make_jobs(given)
    assert (job.width, job.height) == (1024, 1024)
    (job,) = make_jobs(given, (100, 70))
    assert (job.width, job.height) == (96, 64)


@pytest.mark.parametrize("after, kept", [(0, []), (2, ["0000.png", "0001.png"])])
def test_interrupted_pictures_are_kept(world, tmp_path, monkeypatch, after, kept):
    real, calls = euler.euler_sample, []

    def stop(*args, **kwargs):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(euler, "euler_sample", stop)
    with pytest.raises(KeyboardInterrupt):
        render(world, tmp_path / "out", count=5, batch_size=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == kept
