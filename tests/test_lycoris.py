"""LoHa, LoKr and DoRA against the lycoris-lora package and against their definitions."""

from dataclasses import replace

import pytest
import torch
from lycoris.functional import factorization
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from tiny_dit import make_dit, make_inputs, relative_error
from torch import nn

from anima_fast.adapters.deltas import adapted_weight, delta_of
from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.layers import Dropouts
from anima_fast.adapters.lora import LAYERS, add_lora, merge_lora
from anima_fast.adapters.lycoris import HadamardProduct, initial_lokr, initial_magnitudes, split
from anima_fast.adapters.targets import Target
from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import ADAPTER_KINDS, LOHA, LORA
from anima_fast.tools.convert import convert_file

HADAMARD = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}
# (out, in): square, wide, high, odd, prime, one that does not split.
SHAPES = [(64, 64), (96, 24), (24, 96), (45, 77), (13, 30), (7, 5)]
KINDS = {kind.word: kind for kind in ADAPTER_KINDS}
JUDGES = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
LOKR = [{}, {"factor": 4}, {"decompose_both": True}, {"full_matrix": True}]
CASES = [("lora", {}), ("loha", {}), *(("lokr", options) for options in LOKR)]


def fill(part, seed=0):
    """Random values in every matrix, so that each one counts; magnitudes stay positive."""
    generator = torch.Generator().manual_seed(seed)
    filled = part.map(lambda t: 0.5 * torch.randn(t.shape, generator=generator))
    return filled


def make_part(kind, shape, rank=3, alpha=2.0, **options):
    generator = torch.Generator().manual_seed(5)
    initial = LAYERS[KINDS[kind]].initial
    part = initial(shape, rank, generator, **options)
    return fill(replace(part, alpha=torch.tensor(alpha)))


def make_linear(shape, seed=1):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        linear.weight.copy_(values / shape[1] ** 0.5)
    return linear


def attached(part, linear, **dropouts):
    layer = LAYERS[part.kind](Target("dit", "layer", linear), part, Dropouts(**dropouts))
    layer.attach()
    return layer


def with_magnitudes(part, linear, of_inputs=False):
    magnitudes = initial_magnitudes(linear, of_inputs)
    spread = torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(3)) + 0.5
    return replace(part, dora_scale=magnitudes * spread)


def judge_module(part, linear):
    """The package's module with the tensors of a part."""
    suffixes = {"down": "lora_down.weight", "up": "lora_up.weight"}
    state = {f"x.{suffixes.get(k, k)}": t for k, t in part.tensors().items()}
    judge = JUDGES[part.kind.word]
    given = [state.get(f"x.{name}") for name in judge.weight_list]
    with torch.no_grad():
        return judge.make_module_from_state_dict("x", linear, *given)


@pytest.mark.parametrize("factor", [-1, 2, 3, 4, 8, 16, 1000])
def test_dimensions_split_as_in_lycoris(factor):
    for dimension in [*range(1, 300), 1024, 2048, 4096, 6144, 8192]:
        assert split(dimension, factor) == factorization(dimension, factor), dimension


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [(64, (8, 8)), (256, (16, 16)), (1024, (32, 32)), (2048, (32, 64)), (4096, (64, 64)),
     (6144, (64, 96)), (8192, (64, 128))],
)  # fmt: skip
def test_dimensions_of_the_model_split_as_documented(dimension, expected):
    assert split(dimension) == expected


def test_the_default_lokr_of_a_square_layer():
    part = initial_lokr((2048, 2048), 16, torch.Generator())
    shapes = {name: tuple(t.shape) for name, t in part.matrices().items()}
    assert shapes == {"lokr_w1": (32, 32), "lokr_w2_a": (64, 16), "lokr_w2_b": (16, 64)}


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_lycoris_computes_the_same_with_our_tensors(kind, options, shape, alpha):
    """The package's layer, alpha as stored and settled, with and without magnitudes."""
    linear, x = make_linear(shape), torch.randn(4, shape[1])
    part = make_part(kind, shape, alpha=alpha, **options)
    for given in (part, part.settled(), with_magnitudes(part, linear)):
        expected = x @ adapted_weight(linear.weight.detach(), given).T
        assert relative_error(judge_module(given, linear)(x), expected) < 1e-5
    assert relative_error(part.settled().matrix(), part.matrix()) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_we_read_the_tensors_of_lycoris_as_the_same_delta(kind, options, shape):
    linear = make_linear(shape)
    judge = JUDGES[kind]("x", linear, lora_dim=3, alpha=3, **options)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.normal_(std=0.5)
    renamed = {"lora_down.weight": "down", "lora_up.weight": "up"}
    tensors = {renamed.get(k, k): t.detach() for k, t in judge.state_dict().items()}
    tensors = {k: t for k, t in tensors.items() if not k.startswith("org_") and k != "scalar"}
    part = delta_of(tensors)
    assert part.shape == shape and part.kind.word == kind
    assert relative_error(part.matrix(), judge.get_diff_weight()[0]) < 1e-6


@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_magnitudes_mean_what_they_mean_in_lycoris(kind, shape, of_inputs):
    from lycoris.functional.general import weight_decompose

    linear = make_linear(shape)
    part = with_magnitudes(make_part(kind, shape).settled(), linear, of_inputs)
    merged = adapted_weight(linear.weight.detach(), part)
    theirs = weight_decompose(
        linear.weight.detach() + part.matrix(), part.dora_scale, wd_on_out=not of_inputs
    )
    assert relative_error(merged, theirs) < 1e-5


@pytest.mark.parametrize("magnitudes", [None, "outputs", "inputs"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_live_layer_and_its_gradients_are_those_of_the_whole_weight(
    kind, options, shape, magnitudes
):
    """Against autograd through W + Δ built whole, in float64 but for the stored parameters."""
    linear = make_linear(shape)
    part = make_part(kind, shape, **options)
    if magnitudes:
        part = with_magnitudes(part, linear, magnitudes == "inputs")
    layer = attached(part, linear)
    layer.multiplier = 0.7
    x = torch.randn(2, 5, shape[1], generator=torch.Generator().manual_seed(2))
    x.requires_grad_(True)
    dy = torch.randn(2, 5, shape[0], generator=torch.Generator().manual_seed(4))
    y = linear(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], dy)

    leaves = {n: p.detach().double().requires_grad_(True) for n, p in layer.named_parameters()}
    whole = replace(part, **leaves)
    x64 = x.detach().double().requires_grad_(True)
    weight = definition(linear.weight.detach().double(), whole, 0.7)
    expected_y = x64 @ weight.T
    expected = torch.autograd.grad(expected_y, [x64, *leaves.values()], dy.double())
    assert relative_error(y, expected_y) < 1e-5
    for name, got, want in zip(["x", *leaves], found, expected, strict=True):
        assert relative_error(got, want) < 2e-5, name


def definition(weight, part, strength):
    """W + s·Δ or W + s·(W' − W), from the formulas, in the dtype of the weight."""
    if part.kind is LORA:
        delta = part.up @ part.down
    elif part.kind is LOHA:
        delta = (part.w1_a @ part.w1_b) * (part.w2_a @ part.w2_b)
    else:
        first = part.w1_a @ part.w1_b if part.w1 is None else part.w1
        second = part.w2_a @ part.w2_b if part.w2 is None else part.w2
        delta = torch.einsum("lm,kn->lkmn", first, second).reshape(weight.shape)
    delta = delta * part.scale
    if part.dora_scale is None:
        return weight + strength * delta
    built = weight + delta
    axis = 1 if part.dora_scale.shape[0] == len(weight) else 0
    norm = (built * built).sum(axis, keepdim=True).sqrt()
    return weight + strength * (part.dora_scale * built / norm - weight)


def test_the_hadamard_product_passes_gradcheck_over_several_bands(monkeypatch):
    monkeypatch.setattr("anima_fast.adapters.layers.ROWS", 4)
    sizes = [(3, 5), (9, 2), (2, 5), (9, 2), (2, 5)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    assert torch.autograd.gradcheck(lambda *t: HadamardProduct.apply(*t, 0.3), inputs)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_no_full_size_product_is_kept_for_backward(kind):
    shape = (192, 256)
    linear = make_linear(shape)
    attached(make_part(kind, shape, rank=4), linear)
    kept = {}
    x = torch.randn(3, shape[1])

    def pack(t):
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x)
    assert kept and max(kept.values()) < shape[0] * shape[1] / 8


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("dora", [None, "outputs", "inputs"])
def test_a_fresh_network_changes_nothing(kind, dora):
    dit, inputs = make_dit(), make_inputs()
    before = dit(*inputs)
    network = add_lora(dit, kind=kind, rank=2, seed=1, dora=dora)
    assert relative_error(dit(*inputs), before) < 1e-6
    network.remove()
    assert torch.equal(dit(*inputs), before)


@pytest.mark.parametrize("dora", [None, "outputs"])
@pytest.mark.parametrize(
    ("kind", "options"), [("loha", {}), ("lokr", {"lokr": {"factor": 4}}), ("lora", {})]
)
def test_saved_merged_loaded_and_converted(tmp_path, kind, options, dora):
    """A file means the live network, in every dialect, merged or attached again."""
    dit, inputs = make_dit(), make_inputs()
    network = add_lora(dit, kind=kind, rank=3, alpha=5.0, seed=1, dora=dora, **options).eval()
    with torch.no_grad():
        for adapter in network.adapters:
            for name, p in adapter.named_parameters():
                if name != "dora_scale":
                    p.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    expected = dit(*inputs)
    network.save(tmp_path / "own.safetensors")
    convert_file(tmp_path / "own.safetensors", tmp_path / "comfy.safetensors", to="comfyui")
    convert_file(tmp_path / "comfy.safetensors", tmp_path / "back.safetensors")
    convert_file(
        tmp_path / "own.safetensors", tmp_path / "folded.safetensors", to="kohya", fold_alpha=True
    )
    tensors = load_file(tmp_path / "own.safetensors")
    again = load_file(tmp_path / "back.safetensors")
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    for name in ("own", "comfy", "folded"):
        path = tmp_path / f"{name}.safetensors"
        merged = make_dit()
        merge_lora(merged, path)
        assert relative_error(merged(*inputs), expected) < 1e-5, name
        attached_dit = make_dit()
        add_lora(attached_dit, modules_from=read_lora(path)[0]).eval()
        assert relative_error(attached_dit(*inputs), expected) < 1e-5, name
    if kind != "lora":
        parts = read_lora(tmp_path / "own.safetensors")[0].values()
        assert {part.scale for part in parts} == {1.0}


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loading_keeps_the_product_when_the_alphas_differ(tmp_path, kind):
    first = add_lora(make_dit(), kind=kind, rank=2, alpha=1.0, seed=1)
    with torch.no_grad():
        first.flat.normal_(generator=torch.Generator().manual_seed(1))
    first.save(tmp_path / "first.safetensors")
    second = add_lora(make_dit(), kind=kind, rank=2, alpha=4.0, seed=2)
    assert second.load(tmp_path / "first.safetensors") == []
    for name, part in second.deltas().items():
        assert relative_error(part.matrix(), first.deltas()[name].matrix()) < 1e-6, name


def test_a_file_of_another_kind_or_size_is_refused_and_nothing_is_loaded(tmp_path):
    add_lora(make_dit(), kind="loha", rank=2, seed=1).save(tmp_path / "loha.safetensors")
    network = add_lora(make_dit(), kind="lokr", rank=2, seed=1)
    before = network.flat.clone()
    with pytest.raises(UserError, match=r"is a LoHa of rank 2 .* has a LoKr"):
        network.load(tmp_path / "loha.safetensors")
    assert torch.equal(network.flat, before)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (HADAMARD | {"hada_w1_b": (3, 4)}, "rank"),
        (HADAMARD | {"hada_w2_a": (5, 2)}, "sizes"),
        (HADAMARD | {"hada_w2_b": (2, 5)}, "sizes"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (1, 2)}, "rank"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2, 1)}, "expected matrices"),
        ({"down": (2, 3), "up": (3, 2), "dora_scale": (7, 1)}, "fits no side"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2), "lokr_t2": (2, 2)}, "not supported"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(tensors, match):
    with pytest.raises(ValueError, match=match):
        delta_of({name: torch.zeros(shape) for name, shape in tensors.items()})


def test_adapters_of_several_kinds_add_up_on_one_layer():
    shape = (24, 16)
    linear, x = make_linear(shape), torch.randn(3, 16)
    parts = [make_part("lora", shape), make_part("lokr", shape), make_part("loha", shape)]
    parts[2] = with_magnitudes(parts[2], linear)
    layers = [attached(part, linear).eval() for part in parts]
    weight = linear.weight.detach()
    for part in parts:
        weight = adapted_weight(weight, part)
    assert relative_error(linear(x), x @ weight.T) < 1e-5
    layers[1].remove()
    weight = adapted_weight(adapted_weight(linear.weight.detach(), parts[0]), parts[2])
    assert relative_error(linear(x), x @ weight.T) < 1e-5


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_rank_dropout_drops_outputs_and_keeps_their_mean(kind):
    shape = (4000, 8)
    linear = make_linear(shape)
    layer = attached(make_part(kind, shape), linear, rank=0.25).train()
    x = torch.randn(6, 8)
    full = layer.eval().delta(x, 1.0)
    torch.manual_seed(0)
    kept = layer.train().delta(x, 1.0)
    dropped = (kept == 0).all(dim=0)
    assert 0.2 < dropped.float().mean() < 0.3
    assert relative_error(kept[:, ~dropped], full[:, ~dropped] / 0.75) < 1e-6


def test_the_other_dtype_stays_close():
    for kind in ("loha", "lokr"):
        shape = (64, 48)
        linear = make_linear(shape)
        part = make_part(kind, shape)
        layer = attached(part, linear)
        x = torch.randn(5, 48)
        exact = layer.delta(x, 1.0)
        assert layer.delta(x.bfloat16(), 1.0).dtype == torch.bfloat16
        assert relative_error(layer.delta(x.bfloat16(), 1.0).float(), exact) < 0.03


@pytest.mark.parametrize("of_inputs", [False, True])
def test_small_changes_of_magnitudes_act_in_16_bits(of_inputs):
    """A factor of 1.003 is 1 in bfloat16, and the network would train without its magnitudes."""
    linear = make_linear((256, 64)).to(torch.bfloat16)
    part = make_part("lora", (256, 64))
    part = replace(part, up=torch.zeros(256, 3))
    part = replace(part, dora_scale=1.003 * initial_magnitudes(linear, of_inputs))
    x = torch.randn(64, 64).bfloat16()
    plain = linear(x).double()
    attached(part, linear)
    ratio = (linear(x).double() * plain).sum() / plain.square().sum()
    assert 1.002 < ratio < 1.004


def test_the_sides_that_loraplus_speeds_up():
    for kind, suffix in (("lora", "up"), ("loha", "w2_a"), ("lokr", "w1")):
        network = add_lora(make_dit(), kind=kind, rank=2, loraplus_ratio=8.0, unet_lr=1e-3)
        by_name = {g["name"]: g for g in network.param_groups(flat=False)}
        fast = {id(p) for p in by_name["unet_plus"]["params"]}
        assert by_name["unet_plus"]["lr"] == pytest.approx(8e-3)
        assert fast == {id(getattr(a, suffix)) for a in network.adapters}


def test_whole_factors_have_scale_one_whatever_alpha_says(tmp_path):
    tensors = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(16, 16)}
    part = delta_of(tensors | {"alpha": torch.tensor(7.0)})
    assert part.scale == 1 and part.rank is None
    key = "lora_unet_blocks_0_self_attn_q_proj"
    save_file({f"{key}.{k}": t for k, t in part.tensors().items()}, tmp_path / "a.safetensors")
    dit = make_dit()
    before = dit.blocks[0].self_attn.q_proj.weight.detach().clone()
    merge_lora(dit, tmp_path / "a.safetensors")
    change = dit.blocks[0].self_attn.q_proj.weight.detach() - before
    assert relative_error(change, torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])) < 1e-5
