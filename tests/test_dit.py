"""The DiT against golden vectors, against its definition in float64 and against diffusers."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from tiny_dit import TINY, dit_shapes, dit_weights, make_dit, make_inputs, recipe, relative_error

from anima_fast.models.dit import AnimaDiT, DitConfig, load_dit
from anima_fast.models.dit_layers import RMSNorm, timestep_features
from anima_fast.models.flow import FlowSettings, flow_loss, noisy_latents, velocity_target
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.models.rope import apply_rope, rope_angles

FULL = ["dit_hd64", "dit_hd128", "dit_hd64_padmask"]


def one_bf16_step(found, expected):
    """Within one unit in the last place of bfloat16."""
    step = torch.finfo(torch.bfloat16).eps * expected.float().abs().clamp_min(1e-30)
    return ((found.float() - expected.float()).abs() <= 1.01 * step).all()


def taps_of(dit, tensors):
    """Outputs of the layers that the golden taps name."""
    taps = {}

    def keep(name, *, inputs=False):
        def hook(module, args, output):
            taps[name] = args[0] if inputs else output

        return hook

    dit.x_embedder.register_forward_hook(keep("tap.x_embed"))
    dit.t_embedder.register_forward_hook(keep("tap.t_emb_raw", inputs=True))
    dit.t_embedder.register_forward_hook(keep("tap.adaln_lora"))
    dit.t_embedding_norm.register_forward_hook(keep("tap.t_emb_normed"))
    dit.final_layer.register_forward_hook(keep("tap.final_tokens"))
    for index, block in enumerate(dit.blocks):
        block.register_forward_hook(keep(f"tap.block{index}"))
    dit(tensors["x"], tensors["t"], tensors["context"], padding_mask=tensors["padding_mask"])
    return taps


@pytest.mark.parametrize("name", FULL)
def test_golden_forward_and_taps(name):
    tensors, _ = golden.load(name)
    dit = load_dit(golden.weights(tensors), dtype=torch.float32)
    taps = taps_of(dit, tensors)
    assert set(taps) == {key for key in tensors if key.startswith("tap.")}
    for key, found in taps.items():
        expected = tensors[key]
        torch.testing.assert_close(found.view(expected.shape), expected, atol=2e-5, rtol=1e-4)
    for shape in ((2, 16, 1), (2, 16)):
        x = tensors["x"].view(*shape, *tensors["x"].shape[3:])
        out = dit(x, tensors["t"], tensors["context"], padding_mask=tensors["padding_mask"])
        assert out.shape == x.shape
        expected = tensors["out"].view(x.shape)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FULL)
def test_golden_gradients(name):
    tensors, _ = golden.load(name)
    dit = load_dit(golden.weights(tensors), dtype=torch.float32).requires_grad_(True)
    x, context = (tensors[key].clone().requires_grad_() for key in ("x", "context"))
    out = dit(x, tensors["t"], context, padding_mask=tensors["padding_mask"])
    (out * tensors["grad_out"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad_x"], atol=2e-5, rtol=1e-4)
    assert relative_error(context.grad, tensors["grad_context"]) < 1e-5
    parameters = dict(dit.named_parameters())
    checked = [key for key in tensors if key.startswith("grad_w.")]
    assert len(checked) > 20
    for key in checked:
        expected = tensors[key]
        found = parameters[key.removeprefix("grad_w.")].grad
        if expected.dtype == torch.bfloat16:
            atol = 5e-3 * float(expected.float().abs().max())
            torch.testing.assert_close(found, expected.float(), atol=atol, rtol=1e-2)
        else:
            assert relative_error(found, expected) < 1e-4, key


def test_golden_real_width():
    tensors, metadata = golden.load("dit_realwidth_recipe")
    sizes = metadata["config"]
    config = DitConfig(
        model_channels=sizes["model_channels"],
        num_blocks=sizes["num_blocks"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["head_dim"],
        context_dim=sizes["crossattn_emb_channels"],
        adaln_rank=sizes["adaln_lora_dim"],
        mlp_hidden=4 * sizes["model_channels"],
    )
    seed = int(metadata["weights"].split("seed=")[1])
    dit = load_dit(recipe(dit_shapes(config), seed), dtype=torch.float32)
    assert dit.config == config
    x, context = (tensors[key].clone().requires_grad_() for key in ("x", "context"))
    out = dit(x, tensors["t"], context, padding_mask=tensors["padding_mask"])
    torch.testing.assert_close(out, tensors["out"], atol=2e-5, rtol=1e-4)
    (out * tensors["grad_out"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad_x"], atol=2e-5, rtol=1e-4)
    assert relative_error(context.grad, tensors["grad_context"]) < 1e-5


def test_golden_train_step():
    tensors, _ = golden.load("e2e_train_step")
    weights = golden.weights(tensors)
    dit = load_dit(weights, dtype=torch.float32).requires_grad_(True)
    adapter = load_llm_adapter(weights, dtype=torch.float32).requires_grad_(True)
    context = adapter(
        tensors["target_ids"], tensors["target_mask"], tensors["source"], tensors["source_mask"]
    )
    sigma = tensors["sigma"]
    noisy = noisy_latents(tensors["latents"], tensors["noise"], sigma)
    torch.testing.assert_close(noisy, tensors["noisy"])
    pred = dit(noisy, sigma, context)
    torch.testing.assert_close(pred, tensors["pred"], atol=5e-5, rtol=0)
    target = velocity_target(tensors["latents"], tensors["noise"])
    loss = flow_loss(pred, target, sigma, FlowSettings())
    torch.testing.assert_close(loss, tensors["loss_per_sample"], rtol=1e-5, atol=0)
    loss.mean().backward()
    parameters = dict(dit.named_parameters())
    parameters |= {f"llm_adapter.{k}": p for k, p in adapter.named_parameters()}
    checked = [key for key in tensors if key.startswith("grad_w.")]
    assert len(checked) == 6
    for key in checked:
        found = parameters[key.removeprefix("grad_w.")].grad
        assert relative_error(found, tensors[key]) < 2e-3, key


@pytest.mark.parametrize("case", ["hd128_t1_h6_w10", "hd64_t1_h9_w4", "hd128_t2_h3_w5"])
def test_golden_rope(case):
    tensors, _ = golden.load("tables")
    head_dim, *sizes = (int(part.lstrip("hdtw")) for part in case.split("_"))
    angles = rope_angles(head_dim, *sizes)
    expected = tensors[f"rope_{case}.angles"]
    torch.testing.assert_close(angles, expected, atol=1e-6, rtol=1e-6)
    q = tensors[f"rope_{case}.q"]
    rotated = apply_rope(q, angles.cos(), angles.sin())
    expected = tensors[f"rope_{case}.q_rotated"]
    torch.testing.assert_close(rotated, expected, atol=1e-6, rtol=1e-6)
    q = q.bfloat16()
    rotated = apply_rope(q, angles.cos().to(q.dtype), angles.sin().to(q.dtype))
    expected = tensors[f"rope_{case}.q_rotated_bf16"]
    # Each of the two products is rounded, so a step of the larger one may remain.
    torch.testing.assert_close(rotated, expected, atol=2**-6, rtol=2**-7)


def test_golden_timestep_and_norm():
    tensors, _ = golden.load("tables")
    for channels in (128, 2048):
        found = timestep_features(tensors["timestep.t"], channels)
        expected = tensors[f"timestep.embed{channels}"]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    found = timestep_features(tensors["timestep.t"], 128).bfloat16()
    assert one_bf16_step(found, tensors["timestep.embed128_bf16"])
    for dtype in ("f32", "bf16"):
        norm = RMSNorm(128)
        norm.weight.data = tensors[f"rmsnorm_dit.{dtype}.w"]
        found = norm(tensors[f"rmsnorm_dit.{dtype}.x"])
        expected = tensors[f"rmsnorm_dit.{dtype}.y"]
        assert found.dtype == expected.dtype
        if dtype == "f32":
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        else:
            assert one_bf16_step(found, expected)


def test_published_names_shapes_and_counts():
    published = {key: tuple(shape) for key, shape in golden.load_json("keys_dit").items()}
    own = {k: v for k, v in published.items() if not k.startswith("llm_adapter.")}
    config = DitConfig.from_shapes(own)
    assert (config.num_blocks, config.num_heads, config.mlp_hidden) == (28, 16, 8192)
    assert dit_shapes(config) == own
    adapter = sum(torch.Size(v).numel() for k, v in published.items() if k not in own)
    with torch.device("meta"):
        dit = AnimaDiT(config)
        deep = AnimaDiT(dataclasses.replace(config, num_blocks=40))
    parameters = [sum(p.numel() for p in m.parameters()) for m in (dit, deep)]
    assert parameters[0] + adapter == 2_091_068_928
    assert parameters[1] + adapter == 2_921_547_264
    assert DitConfig.from_shapes(dit_shapes(deep.config)).num_blocks == 40


@pytest.mark.parametrize("blocks", [1, 28, 40])
def test_any_depth_runs(blocks):
    config = dataclasses.replace(TINY, num_blocks=blocks)
    dit = make_dit(config)
    assert len(dit.blocks) == blocks
    out = dit(*make_inputs(config))
    assert out.isfinite().all() and out.std() > 0.1


@pytest.mark.parametrize("zero_keys", [507, [3, 507], torch.tensor([0, 20])])
def test_zero_keys_equal_padded_rows(zero_keys):
    """Also when k and v projections are changed, as a LoRA does, and for gradients."""
    dit = make_dit()
    generator = torch.Generator().manual_seed(5)
    for block in dit.blocks:
        for layer in (block.cross_attn.k_proj, block.cross_attn.v_proj):
            layer.weight.data += 0.1 * torch.randn(layer.weight.shape, generator=generator)
    latents, sigma, context = make_inputs()
    counts = [zero_keys] * 2 if isinstance(zero_keys, int) else [int(n) for n in zero_keys]
    short = context.clone().requires_grad_()
    out = dit(latents, sigma, short, zero_keys=zero_keys)
    (grad,) = torch.autograd.grad(out.square().sum(), short)
    for i, count in enumerate(counts):
        padded = torch.cat([context[i : i + 1], torch.zeros(1, count, 24)], 1).requires_grad_()
        expected = dit(latents[i : i + 1], sigma[i : i + 1], padded)
        torch.testing.assert_close(out[i : i + 1], expected, atol=3e-6, rtol=1e-5)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), padded)
        torch.testing.assert_close(
            grad[i : i + 1], expected_grad[:, : context.shape[1]], atol=1e-4, rtol=1e-4
        )


def test_context_without_any_row():
    latents, sigma, context = make_inputs()
    dit = make_dit()
    out = dit(latents, sigma, context[:, :0], zero_keys=512)
    expected = dit(latents, sigma, torch.zeros(2, 512, 24))
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=1e-5)


def test_padding_mask_is_resized_and_matters():
    latents, sigma, context = make_inputs()
    dit = make_dit()
    small = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None].expand(2, 1, 2, 2)
    large = small.repeat_interleave(4, 2).repeat_interleave(6, 3)
    out = dit(latents, sigma, context, padding_mask=small)
    torch.testing.assert_close(out, dit(latents, sigma, context, padding_mask=large))
    assert (out - dit(latents, sigma, context)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    latents, sigma, context = make_inputs()
    rounded = {k: v.to(dtype).double() for k, v in dit_weights().items()}
    oracle = load_dit(rounded, dtype=torch.float64)(latents.double(), sigma, context.double())
    dit = make_dit(dtype=dtype)
    out = dit(latents, sigma, context, zero_keys=0)
    half = dtype == torch.float16
    assert out.dtype == (torch.float32 if half else dtype)
    assert dit.dtype == dtype
    kept = {dit.t_embedder[1].linear_1.weight.dtype, dit.final_layer.linear.weight.dtype}
    kept |= {dit.blocks[0].adaln_modulation_mlp[2].weight.dtype}
    assert kept == {torch.float32 if half else dtype}
    limits = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-7}
    assert relative_error(out, oracle) < limits[dtype]


def test_float16_holds_a_large_residual_stream():
    """Values beyond 65504 must pass from block to block."""
    dit = make_dit(dtype=torch.float16)
    for block in dit.blocks:
        # Rows of the gate only: what goes into the MLP stays small.
        block.adaln_modulation_mlp[2].weight.data[128:] *= 3e5
    seen = []
    dit.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    out = dit(*make_inputs())
    assert seen[0].abs().max() > 65504 and seen[0].dtype == torch.float32
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("latents", "sigma", "context", "match"),
    [
        ((2, 16, 7, 8), (2,), (2, 3, 24), "even H and W"),
        ((2, 16, 8, 9), (2,), (2, 3, 24), "even H and W"),
        ((2, 4, 8, 8), (2,), (2, 3, 24), "expected \\[B, 16, H, W\\]"),
        ((2, 16, 2, 8, 8), (2,), (2, 3, 24), "latents are"),
        ((2, 16, 8, 8), (3,), (2, 3, 24), "sigma is"),
        ((2, 16, 8, 8), (2, 1), (2, 3, 24), "sigma is"),
        ((2, 16, 8, 8), (2,), (2, 3, 20), "context is"),
        ((2, 16, 8, 8), (2,), (1, 3, 24), "context is"),
    ],
)
def test_wrong_shapes(latents, sigma, context, match):
    with pytest.raises(ValueError, match=match):
        make_dit()(torch.zeros(latents), torch.zeros(sigma), torch.zeros(context))


DIFFUSERS_NAMES = {
    "blocks.": "transformer_blocks.",
    "self_attn.": "attn1.",
    "cross_attn.": "attn2.",
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1": "time_embed.t_embedder",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.linear": "proj_out",
}


def diffusers_name(name):
    """Our tensor name in CosmosTransformer3DModel."""
    for index, branch in enumerate(("self_attn", "cross_attn", "mlp"), 1):
        name = name.replace(f"adaln_modulation_{branch}.", f"norm{index}.linear_")
    name = name.replace("final_layer.adaln_modulation.", "norm_out.linear_")
    for ours, theirs in DIFFUSERS_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize(("head_dim", "size"), [(32, (8, 12)), (64, (14, 6))])
def test_parity_with_diffusers(head_dim, size):
    # Skips where diffusers is not installed.
    from diffusers_dit import make_transformer

    config = dataclasses.replace(TINY, model_channels=128, mlp_hidden=512)
    config = dataclasses.replace(config, head_dim=head_dim, num_heads=128 // head_dim)
    weights = dit_weights(config, seed=11)
    theirs = make_transformer(config)
    theirs.load_state_dict({diffusers_name(k): v for k, v in weights.items()}, strict=True)
    latents, sigma, context = make_inputs(config, size=size)
    latents.requires_grad_()
    # Its pipeline pads the conditioner's rows with zeros to 512 and gives no attention mask.
    padded = torch.cat([context, torch.zeros(2, 512 - context.shape[1], 24)], 1)
    mask = torch.zeros(2, 1, 1, *size)
    expected = theirs(torch.cat([latents[:, :, None], mask], 1), sigma, padded).sample[:, :, 0]
    out = load_dit(weights, dtype=torch.float32)(
        latents, sigma, context, zero_keys=512 - context.shape[1]
    )
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    grads = [torch.autograd.grad(o.square().mean(), latents)[0] for o in (out, expected)]
    assert relative_error(*grads) < 1e-4


WITHOUT_TRITON = """\
import sys
sys.modules["triton"] = None
import anima_fast.sampling.run, anima_fast.training.loop
from anima_fast.models.flow import FlowSettings, flow_loss
from tiny_dit import TINY, make_dit, make_inputs
dit, (latents, sigma, context) = make_dit(TINY).requires_grad_(), make_inputs(TINY)
out = dit(latents, sigma, context, zero_keys=3)
flow_loss(out, out.detach() + 1, sigma, FlowSettings()).mean().backward()
assert all(p.grad is not None for p in dit.blocks.parameters())
"""


def test_eager_blocks_run_without_triton():
    tests = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(tests), str(tests.parent)]}\n{WITHOUT_TRITON}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
