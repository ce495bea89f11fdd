"""Sampling: the Euler sampler against golden vectors, prompts, PNG files, LoRA files."""

from pathlib import Path

import pytest
import torch
from golden import load, weights
from PIL import Image

from anima_fast import sampling
from anima_fast.adapters.lora import add_lora
from anima_fast.demo.tiny_stack import build_stack
from anima_fast.errors import UserError
from anima_fast.models.dit import load_dit
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.models.text_encoder import load_text_encoder
from anima_fast.options.sample import SampleOptions
from anima_fast.sampling import pictures, prompts
from anima_fast.tools.convert import convert_file


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    return build_stack(folder, blocks=2, width=64, head_dim=32, context_dim=32)


@pytest.fixture(scope="module")
def lora(stack, tmp_path_factory):
    """A LoRA over DiT, adapter and text encoder whose up matrices are not zero."""
    torch.manual_seed(0)
    dit = load_dit(stack.dit, dtype=torch.float32)
    adapter = load_llm_adapter(stack.dit, dtype=torch.float32)
    encoder = load_text_encoder(stack.qwen3, dtype=torch.float32)
    network = add_lora(dit, rank=4, alpha=2, llm_adapter=adapter, text_encoder=encoder, seed=1)
    with torch.no_grad():
        for module in network.modules_by_name.values():
            module.up.normal_(std=0.3)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    network.save(path)
    return path


def options(stack, path: Path, **changes) -> SampleOptions:
    values = {
        "dit": str(stack.dit),
        "qwen3": str(stack.qwen3),
        "vae": str(stack.vae),
        "t5_tokenizer_path": str(stack.t5_tokenizer),
        "prompt": "a photograph of a cat",
        "seed": 5,
        "steps": 3,
        "cfg": 1.0,
        "width": 48,
        "height": 32,
        "dtype": "fp32",
        "device": "cpu",
        "output": str(path),
        **changes,
    }
    return SampleOptions(**values)


def render(stack, tmp_path, **changes) -> torch.Tensor:
    path = sampling.run_sample(options(stack, tmp_path / "x.png", **changes), quiet=True)
    with Image.open(path) as image:
        raw = bytearray(image.convert("RGB").tobytes())
        return torch.frombuffer(raw, dtype=torch.uint8).view(image.height, image.width, 3)


@pytest.mark.parametrize("guided", [True, False])
def test_euler_meets_the_golden_vectors(guided):
    tensors, metadata = load("sampler")
    config = metadata["config"]
    dit = load_dit(weights(tensors), dtype=torch.float32)
    done = []
    out = sampling.euler_sample(
        dit,
        tensors["noise"],
        tensors["pos"],
        tensors["neg"] if guided else None,
        steps=config["steps"],
        shift=config["flow_shift"],
        guidance=config["guidance_scale"] if guided else 1.0,
        on_step=lambda: done.append(len(done) + 1),
    )
    torch.testing.assert_close(
        out, tensors["out_cfg" if guided else "out_nocfg"], atol=1e-4, rtol=0
    )
    assert done == [1, 2, 3, 4]


def test_trimmed_contexts_give_what_padded_ones_give():
    tensors, _ = load("sampler")
    dit = load_dit(weights(tensors), dtype=torch.float32)
    positive, negative = tensors["pos"][:, :6], tensors["neg"][:, :3]
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 20 - x.shape[1])) for x in (positive, negative)]
    settings = {"steps": 2, "shift": 3.0, "guidance": 2.5}
    expected = sampling.euler_sample(dit, tensors["noise"], *padded, **settings)
    found = sampling.euler_sample(
        dit, tensors["noise"], positive, negative, zero_keys=14, negative_zero_keys=17, **settings
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_guidance_without_a_negative_context_is_refused():
    with pytest.raises(ValueError, match="negative"):
        sampling.euler_sample(
            lambda *a, **k: None, torch.zeros(1, 16, 2, 2), torch.zeros(1, 1, 4),
            steps=1, shift=1.0, guidance=2.0,
        )  # fmt: skip


def test_start_noise_is_the_published_draw():
    torch.manual_seed(11)
    expected = torch.randn(1, 16, 1, 4, 6)
    torch.testing.assert_close(sampling.start_noise(11, 48, 32), expected, atol=0, rtol=0)


def test_png_has_the_size_and_says_how_it_was_made(stack, lora, tmp_path):
    path = sampling.run_sample(
        options(
            stack,
            tmp_path / "deep" / "picture.png",
            prompt="猫 on\\na mat",
            negative_prompt="blur",
            cfg=2.0,
            lora=(f"{lora}:0.5",),
        ),
        quiet=True,
    )
    with Image.open(path) as image:
        assert image.size == (48, 32) and image.mode == "RGB"
        text = image.text["parameters"]
    assert text.splitlines()[:3] == ["猫 on", "a mat", "Negative prompt: blur"]
    for fact in ("Steps: 3", "CFG scale: 2", "Seed: 5", "Size: 48x32", "Shift: 3", "Model: dit"):
        assert fact in text
    assert "LoRA: lora:0.5" in text
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def test_seed_prompt_and_guidance_change_the_picture(stack, tmp_path):
    first = render(stack, tmp_path)
    assert torch.equal(first, render(stack, tmp_path))
    for change in ({"seed": 6}, {"prompt": "a rocket"}, {"cfg": 3.0}, {"shift": 1.0}):
        assert not torch.equal(first, render(stack, tmp_path, **change)), change


def test_a_drawn_seed_is_recorded_and_reproduces_the_picture(stack, tmp_path):
    first = render(stack, tmp_path, seed=None)
    with Image.open(tmp_path / "x.png") as image:
        seed = int(image.text["parameters"].split("Seed: ")[1].split(",")[0])
    assert torch.equal(first, render(stack, tmp_path, seed=seed))


def test_lora_weight_zero_is_no_lora_and_one_is_a_change(stack, lora, tmp_path):
    plain = render(stack, tmp_path)
    assert torch.equal(plain, render(stack, tmp_path, lora=(f"{lora}:0",)))
    assert not torch.equal(plain, render(stack, tmp_path, lora=(str(lora),)))


@pytest.mark.parametrize("dialect", ["comfyui", "folded"])
def test_every_dialect_renders_the_same(stack, lora, tmp_path, dialect):
    other = tmp_path / "other.safetensors"
    convert_file(lora, other, to="comfyui", fold_alpha=dialect == "folded")
    first = render(stack, tmp_path, lora=(str(lora),))
    assert (first.int() - render(stack, tmp_path, lora=(str(other),)).int()).abs().max() <= 1


def test_two_loras_add_up(stack, lora, tmp_path):
    once = render(stack, tmp_path, lora=(f"{lora}:0.75",))
    twice = render(stack, tmp_path, lora=(f"{lora}:0.5", f"{lora}:0.25"))
    assert (once.int() - twice.int()).abs().max() <= 1


def test_an_attached_lora_acts_like_the_trained_network(stack, lora):
    latents, context = torch.randn(1, 16, 4, 6), torch.randn(1, 3, 32)
    inputs = (latents, torch.tensor([0.4]), context)
    dit = load_dit(stack.dit, dtype=torch.float32)
    plain = dit(*inputs)
    network = add_lora(dit, rank=4, alpha=2)
    network.load(lora)
    network.multiplier = 0.5
    with torch.no_grad():
        expected = network.eval() and dit(*inputs)
    other = load_dit(stack.dit, dtype=torch.float32)
    attached = sampling.attach_lora(sampling.LoRAFile.read(lora, 0.5), dit=other)
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs), expected, atol=1e-6, rtol=0)
    assert (expected - plain).abs().max() > 1e-3
    # Only the parts of the model that was given.
    assert not any(name.startswith(("llm_adapter", "text_encoder")) for name in
                   attached.modules_by_name)  # fmt: skip


def test_a_lora_of_another_size_is_refused(stack, lora, tmp_path, monkeypatch):
    wide = build_stack(tmp_path / "wide", blocks=1, width=128, head_dim=64, context_dim=32)
    with pytest.raises(UserError, match="does not fit this DiT"):
        # Told from the headers: no model is loaded for a file that cannot be used.
        monkeypatch.setattr("anima_fast.models.text_encoder.load_text_encoder", None)
        render(wide, tmp_path, lora=(str(lora),))
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dit": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"output": "picture.jpg"}, ".png"),
        ({"width": 50}, "multiple of 16"),
        ({"lora": ("absent.safetensors",)}, "absent.safetensors"),
    ],
)
def test_bad_input_is_one_readable_error(stack, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        render(stack, tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_vae_given_as_dit_is_refused(stack, tmp_path):
    with pytest.raises(UserError, match="DiT"):
        render(stack, tmp_path, dit=str(stack.vae))


def test_numbers_that_are_not_finite_write_no_picture(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sampling.euler,
        "euler_sample",
        lambda dit, noise, *a, **k: torch.full_like(noise, torch.nan),
    )
    with pytest.raises(UserError, match="not finite"):
        render(stack, tmp_path)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_close_to_float32(stack, tmp_path, dtype):
    exact = render(stack, tmp_path).float()
    found = render(stack, tmp_path, dtype=dtype).float()
    assert (found - exact).abs().mean() < 6


def test_long_prompts_are_read_to_their_end(stack, tmp_path):
    """512 rows is the least, as in ComfyUI: the last word of a long prompt still counts."""
    long = "cat " * 600
    assert not torch.equal(
        render(stack, tmp_path, prompt=long + "red"), render(stack, tmp_path, prompt=long + "blue")
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (r"a\nb\tc", "a\nb\tc"),
        (r"\u732b and \u00e9", "猫 and é"),
        (r"\ud83d\ude80!", "🚀!"),
        (r"\ud83d alone", r"\ud83d alone"),
        (r"\(literal\) \x41 \u12 \q", r"\(literal\) \x41 \u12 \q"),
        ("猫 stays, é too", "猫 stays, é too"),
    ],
)
def test_unescape(prompt, expected):
    assert prompts.unescape(prompt) == expected


def test_pixels_are_rounded():
    levels = torch.tensor([-1.0, -0.9999, 0.0, 0.4999 / 127.5, 1.0, 1.2])
    pixels = levels.repeat(3, 1, 1)
    found = list(pictures.to_image(pixels).getdata(0))
    assert found == [0, 0, 128, 128, 255, 255]
