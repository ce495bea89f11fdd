"""The demo, shortened: every file that it promises is there and is what its name says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anima_fast.demo import run as demo
from anima_fast.demo.tiny_stack import save_vae
from anima_fast.demo.vae import PatchComponents, fit_vae
from anima_fast.errors import UserError
from anima_fast.models.vae_checkpoint import load_vae


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("demo") / "it's here"
    demo.run_demo(folder, vae_steps=4, repeats=2, steps=2)
    return folder


def test_both_dialects_hold_the_same_tensors(out):
    kohya = load_file(out / "run" / "demo_lora.safetensors")
    comfyui = load_file(out / "run" / "demo_lora_comfyui.safetensors")
    assert len(kohya) == len(comfyui) == 4 * 10 * 3
    name = "blocks.3.cross_attn.v_proj"
    up = kohya["lora_unet_blocks_3_cross_attn_v_proj.lora_up.weight"]
    assert torch.equal(up, comfyui[f"diffusion_model.{name}.lora_B.weight"]) and up.any()


def test_previews_change_with_training(out):
    for name, (_, size) in demo.PHOTOGRAPHS.items():
        stages = [out / "previews" / f"{name}-{stage}.png" for stage in ("before", "after")]
        before, after = (Image.open(path) for path in stages)
        assert before.size == after.size == size
        assert before.tobytes() != after.tobytes()


def test_the_report_shows_the_run(out):
    text = (out / "report.html").read_text(encoding="utf-8")
    # Three galleries, and two prompts before training and after each epoch.
    over_time = len(demo.PREVIEWS) * (1 + demo.EPOCHS)
    assert text.count("<img ") == 3 * len(demo.PHOTOGRAPHS) + over_time
    assert text.count("<svg ") == 5
    steps = (out / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    count = sum(json.loads(line)["kind"] == "step" for line in steps)
    assert f"<td>{count}</td>" in text


def test_previews_have_the_size_that_was_trained(out):
    """A bucket of the plan for each photograph, so that a preview shows what was learnt."""
    from anima_fast.data.plan import build_plan
    from anima_fast.demo.tiny_stack import Stack

    models = out / "models"
    stack = Stack(
        models / "dit.safetensors", models / "qwen3", models / "vae.safetensors", models / "t5"
    )
    plan = build_plan(demo.train_options(out, stack, 0, 4))
    assert {item.path.stem: item.bucket for item in plan.items} == {
        name: size for name, (_, size) in demo.PHOTOGRAPHS.items()
    }


@pytest.mark.slow
def test_a_stack_is_the_same_in_every_process(tmp_path):
    """The trainer of the T5 pieces sums in another order each time, and hashes order its ties."""
    code = (
        "import sys; from pathlib import Path; from anima_fast.demo.tiny_stack import build_stack; "
        "build_stack(Path(sys.argv[1]), blocks=1, width=64, head_dim=32, context_dim=32)"
    )
    stacks = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
        )  # fmt: skip
        files = [path for path in folder.rglob("*") if path.is_file()]
        stacks.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert len(stacks[0]) == 6 and stacks[0] == stacks[1]


def test_a_fitted_vae_survives_its_file_and_shows_the_image(tmp_path):
    torch.manual_seed(0)
    coarse = torch.rand(1, 3, 6, 6) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, 96, mode="bicubic")[0].clamp(-1, 1)
    losses = []
    vae = fit_vae([image], width=8, steps=60, on_step=lambda step, loss: losses.append(loss))
    save_vae(vae, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors")
    latents = vae.encode(image[None])
    torch.testing.assert_close(loaded.encode(image[None]), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.decode(latents), vae.decode(latents), atol=1e-5, rtol=0)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_patch_components_have_deviation_one_and_no_correlation():
    torch.manual_seed(0)
    image = torch.randn(3, 80, 80).cumsum(1).cumsum(2)
    found = PatchComponents([image], 4)(image[None])[0].flatten(1)
    assert found.shape == (4, 100)
    assert (found.std(1) - 1).abs().max() < 0.3
    assert (torch.corrcoef(found) - torch.eye(4)).abs().max() < 0.3


def test_without_scikit_image_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(UserError, match=r"anima-fast\[demo\]"):
        demo.run_demo(tmp_path)
