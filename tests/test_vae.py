"""The VAE: golden vectors, diffusers' network, both namings, exact and bounded row chunks."""

import json
import re
import zlib

import golden
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from anima_fast.errors import UserError
from anima_fast.models.vae import VAE, VaeConfig
from anima_fast.models.vae_checkpoint import image_shape, load_vae, published_names
from anima_fast.models.vae_layers import ChannelNorm

CLOSE = {"atol": 5e-5, "rtol": 1e-4}
# A width-8 network: small, and its levels still differ in width.
WIDTH = 8


def recipe(name, shape, seed):
    """The golden files' weights by diffusers name."""
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    a = state.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
    if name.endswith("gamma"):
        return torch.from_numpy(1 + np.float32(0.1) * a)
    if name.endswith("bias"):
        return torch.from_numpy(np.float32(0.05) * a)
    used = shape[1] * shape[3] * shape[4] if len(shape) == 5 else np.prod(shape[1:])
    return torch.from_numpy(a / np.float32(np.sqrt(used)))


def published(width=WIDTH, naming="diffusers", seed=0):
    """A full random state dict, `time_conv` included, of the given base width."""
    state = {}
    for row in golden.load_json("keys_vae"):
        shape = [n * width // 96 if n % 96 == 0 else n for n in row["shape"]]
        state[row[naming]] = recipe(row["diffusers"], shape, seed)
    return state


def image(height, width, batch=1):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def vae():
    return load_vae(published())


@pytest.mark.parametrize("name", ["vae_dim16", "vae_dim96_recipe"])
@torch.inference_mode()
def test_golden(name):
    tensors, metadata = golden.load(name)
    seed = re.search(r"recipe seed=(\d+)", metadata["weights"])
    vae = load_vae(published(96, seed=int(seed[1])) if seed else golden.weights(tensors))
    for size in ("32x32", "64x48"):
        pixels = tensors[f"image_{size}"]
        moments = tensors[f"moments_{size}"][:, :, 0]
        torch.testing.assert_close(vae.moments(pixels), moments, **CLOSE)
        torch.testing.assert_close(vae.encode(pixels), tensors[f"latents_{size}"], **CLOSE)
        decoded = vae.decode(tensors[f"z_{size}"])
        torch.testing.assert_close(decoded, tensors[f"decoded_{size}"], **CLOSE)
        decoded = vae.decode(tensors[f"z_{size}"], chunk_rows=16)
        torch.testing.assert_close(decoded, tensors[f"decoded_{size}"], **CLOSE)


@torch.inference_mode()
def test_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    theirs = diffusers.AutoencoderKLQwenImage(base_dim=WIDTH).eval()
    state = published(seed=3)
    theirs.load_state_dict(state)
    ours = load_vae(state)
    x = image(40, 64, batch=2)
    mean = theirs.encode(x[:, :, None]).latent_dist.mode()
    torch.testing.assert_close(ours.moments(x)[:, :16], mean[:, :, 0], **CLOSE)
    z = torch.randn(2, 16, 5, 8)
    published_stats = (theirs.config.latents_std, theirs.config.latents_mean)
    scale, shift = (torch.tensor(values)[:, None, None] for values in published_stats)
    expected = theirs.decode((z * scale + shift)[:, :, None], return_dict=False)[0][:, :, 0]
    torch.testing.assert_close(ours.decode(z), expected.clamp(-1, 1), **CLOSE)
    assert expected.abs().mean() > 0.05 and (expected.abs() < 1).any()


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (64, 48), (72, 24), (136, 8)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 10, 16, 31, 64, 72, 1000])
@torch.inference_mode()
def test_chunks_are_exact(vae, size, rows):
    x = image(*size, batch=2)
    latents = vae.encode(x)
    torch.testing.assert_close(vae.encode(x, chunk_rows=rows), latents, atol=1e-5, rtol=0)
    # Before the clamp, where nothing can hide.
    z = vae.from_latents(latents)
    whole, strips = vae.decoder(z), vae.decoder(z, rows)
    torch.testing.assert_close(strips, whole, atol=1e-5, rtol=1e-5)


class LargestRows(TorchDispatchMode):
    """Rows of every feature map above 1/8 resolution that any operation makes."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 4:
            _, channels, rows, columns = out.shape
            if channels > 3 and columns > self.columns // 8:
                self.rows = max(self.rows, rows)
        return out


@pytest.mark.parametrize("rows", [16, 64])
@torch.inference_mode()
def test_full_resolution_maps_are_never_whole(vae, rows):
    x = image(320, 32)
    z = torch.zeros(1, 16, 40, 4)
    for run in (lambda n: vae.encode(x, n), lambda n: vae.decode(z, n)):
        with LargestRows(32) as whole:
            run(None)
        with LargestRows(32) as chunked:
            run(rows)
        assert whole.rows >= 320
        # What a stage is given, the two rows it kept and the border; upsampling adds one more.
        assert 0 < chunked.rows <= rows + 4


def test_key_table_and_namings():
    rows = golden.load_json("keys_vae")
    shapes = {row["wan"]: row["shape"] for row in rows if ".time_conv." not in row["wan"]}
    wan, theirs = (published_names(VaeConfig(), naming) for naming in ("wan", "diffusers"))
    assert set(wan.values()) == set(shapes)
    to_diffusers = {row["wan"]: row["diffusers"] for row in rows}
    assert all(to_diffusers[wan[name]] == theirs[name] for name in wan)
    with torch.device("meta"):
        network = VAE(VaeConfig()).state_dict()
    assert all(image_shape(wan[k], shapes[wan[k]]) == tuple(v.shape) for k, v in network.items())


@torch.inference_mode()
def test_a_norm_may_be_stored_with_five_dimensions(vae):
    state = published()
    state["encoder.norm_out.gamma"] = state["encoder.norm_out.gamma"].reshape(-1, 1, 1, 1, 1)
    x = image(16, 16)
    assert torch.equal(load_vae(state).encode(x), load_vae(published()).encode(x))


def test_files_of_both_namings_agree(vae, tmp_path):
    wan = published(naming="wan")
    save_file(wan, tmp_path / "wan.safetensors")
    save_file({f"first_stage_model.{k}": v for k, v in wan.items()}, tmp_path / "all.safetensors")
    torch.save(wan, tmp_path / "wan.pth")
    x = image(16, 24)
    for name in ("wan.safetensors", "all.safetensors", "wan.pth"):
        assert torch.equal(load_vae(tmp_path / name).encode(x), vae.encode(x)), name


@torch.inference_mode()
def test_only_the_last_frame_slice_counts(vae):
    state = published()
    for name, tensor in state.items():
        if tensor.ndim == 5:
            tensor[:, :, :-1] = 100.0
        if ".time_conv." in name:
            tensor.fill_(float("nan"))
    x = image(16, 16)
    assert torch.equal(load_vae(state).encode(x), vae.encode(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision(vae, dtype):
    half = load_vae(published(), dtype=dtype)
    x = image(32, 32)
    x[:, :, :16] = 0
    latents = half.encode(x, chunk_rows=16)
    assert latents.dtype == torch.float32
    error = (latents - vae.encode(x)).norm() / vae.encode(x).norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert half.decode(latents).abs().max() <= 1


@torch.inference_mode()
def test_zero_map_in_half_precision_is_finite():
    norm = ChannelNorm(4).half()
    zeros = torch.zeros(1, 4, 2, 2, dtype=torch.float16)
    assert torch.equal(norm(zeros, silu=True), zeros)


def test_gradients_reach_the_image(vae):
    x = image(16, 16).requires_grad_()
    whole = torch.autograd.grad(vae.encode(x).square().sum(), x)[0]
    strips = torch.autograd.grad(vae.encode(x, chunk_rows=6).square().sum(), x)[0]
    assert whole.abs().max() > 0
    torch.testing.assert_close(strips, whole, atol=1e-4, rtol=1e-4)


def test_calls_leave_their_input_alone(vae):
    x = image(16, 16)
    before = x.clone()
    with torch.inference_mode():
        latents = vae.encode(x)
        kept = latents.clone()
        vae.decode(latents)
    assert torch.equal(x, before) and torch.equal(latents, kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("encoder.norm_out.gamma"), ["1 tensors missing", "encoder.norm_out"]),
        (lambda s: s.update(extra=torch.zeros(1)), ["unexpected", "extra"]),
        (
            lambda s: s.update({"decoder.conv_out.bias": torch.zeros(4)}),
            ["decoder.conv_out.bias", "[4] instead of [3]"],
        ),
        (lambda s: s.pop("post_quant_conv.weight"), ["post_quant_conv.weight"]),
        (
            lambda s: s.update({"post_quant_conv.weight": torch.zeros(48, 48, 1, 1, 1)}),
            ["48 latent channels"],
        ),
        (lambda s: s.pop("encoder.conv_in.weight"), ["--vae"]),
        (
            lambda s: s.update({"encoder.down.0.block.0.norm1.weight": torch.zeros(1)}),
            ["another model"],
        ),
    ],
)
def test_refuses_incomplete_or_foreign_weights(change, words):
    state = published()
    change(state)
    with pytest.raises(UserError) as error:
        load_vae(state)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["net.t_embedding_norm.weight", "net.x_embedder.proj.1.weight"], "DiT"),
        (["lora_unet_blocks_0_mlp_layer1.lora_down.weight"], "LoRA"),
    ],
)
def test_names_the_wrong_kind_of_file(tmp_path, keys, words):
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=words):
        load_vae(tmp_path / "other.safetensors")


@pytest.mark.parametrize("content", [b"", b"garbage" * 20])
def test_damaged_file(tmp_path, content):
    (tmp_path / "vae.safetensors").write_bytes(content)
    with pytest.raises(UserError):
        load_vae(tmp_path / "vae.safetensors")


def test_wrong_shapes_are_value_errors(vae):
    for x in (torch.zeros(1, 3, 20, 16), torch.zeros(1, 4, 16, 16), torch.zeros(3, 16, 16)):
        with pytest.raises(ValueError, match="expected"):
            vae.encode(x)
    with pytest.raises(ValueError, match="chunk_rows"):
        vae.encode(torch.zeros(1, 3, 16, 16), chunk_rows=0)
    with pytest.raises(ValueError, match="latents"):
        vae.decode(torch.zeros(1, 4, 2, 2))


def test_weights_are_not_the_callers(vae):
    state = published()
    mine = load_vae(state)
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), vae.parameters(), strict=True))


def test_config_is_read_from_shapes(vae):
    assert vae.config == VaeConfig(width=WIDTH, latent=16)
    assert json.dumps(vars(vae.config)) == '{"width": 8, "latent": 16}'
