"""Low-rank approximation, rules that choose a rank, and networks of lower rank."""

import pytest
import torch
from finished import write_network
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anima_fast.adapters.deltas import LoHaDelta, LoKrDelta, LoRADelta
from anima_fast.adapters.formats import FOLDED, read_lora
from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import LORA
from anima_fast.tools.convert import convert_file
from anima_fast.tools.low_rank import Dense, Product, weighted_sum
from anima_fast.tools.ranks import ModuleLoss, RankRule, loss_table, total_error
from anima_fast.tools.resize import resize_delta, resize_file

Q = "blocks.0.self_attn.q_proj"


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def parts():
    """Parts for a weight [48, 64]: four whose factors are thin, two whose factors are not."""
    yield LoRADelta(rand(3, 64), rand(48, 3))
    yield LoHaDelta(rand(48, 3), rand(3, 64), rand(48, 3, seed=1), rand(3, 64, seed=1))
    yield LoKrDelta(w1=rand(2, 4), w2_a=rand(24, 2), w2_b=rand(2, 16))
    yield LoKrDelta(w1_a=rand(6, 1), w1_b=rand(1, 8), w2=rand(8, 8))
    yield LoKrDelta(w1=rand(3, 2), w2=rand(16, 32))
    yield LoHaDelta(rand(48, 8), rand(8, 64), rand(48, 8, seed=1), rand(8, 64, seed=1))


# The approximation


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25), (1, 9), (9, 1)])
def test_a_matrix_is_cut_as_by_its_svd(shape):
    matrix = rand(*shape)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    spectrum = Dense(matrix).spectrum()
    torch.testing.assert_close(spectrum.values, values)
    for rank in range(1, len(values) + 1):
        up, down = spectrum.cut(rank)
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        torch.testing.assert_close(up @ down, best)
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
        lost = Dense(matrix).distance(up, down)
        assert lost == pytest.approx(values[rank:].norm().item(), abs=1e-9)


@pytest.mark.parametrize("index", range(6))
def test_factors_stand_for_their_product(index):
    part = list(parts())[index]
    whole, found = part.product(), weighted_sum([(-2.0, part)])
    assert isinstance(found, Product if index < 4 else Dense)
    torch.testing.assert_close(found.norm(), 2 * whole.norm().item())
    spectrum = found.spectrum()
    values = torch.linalg.svdvals(2 * whole)
    # The Gram matrix leaves half the digits to the smallest values.
    atol = 1e-7 * values[0].item()
    torch.testing.assert_close(spectrum.values, values[: len(spectrum.values)], rtol=0, atol=atol)
    up, down = spectrum.cut(2)
    lost = (-2 * whole - up @ down).norm().item()
    assert lost == pytest.approx(values[2:].norm().item())
    assert found.distance(up, down) == pytest.approx(lost)


def test_a_sum_of_all_kinds():
    terms = [(0.5 * i - 1, part) for i, part in enumerate(parts())]
    whole = sum(weight * part.product() for weight, part in terms)
    for chosen in (terms, terms[:2]):
        whole = sum(weight * part.product() for weight, part in chosen)
        found = weighted_sum(chosen)
        torch.testing.assert_close(found.norm(), whole.norm().item())
        up, down = found.spectrum().cut(48)
        assert (up @ down - whole).norm() < 1e-6 * whole.norm()
    with pytest.raises(ValueError, match="different sizes"):
        weighted_sum([(1.0, terms[0][1]), (1.0, LoRADelta(rand(3, 60), rand(48, 3)))])


def test_zero_has_a_zero_approximation():
    for matrix in (
        Dense(torch.zeros(4, 6).double()),
        Product(rand(4, 2), torch.zeros(2, 6).double()),
    ):
        up, down = matrix.spectrum().cut(2)
        assert torch.equal(up @ down, torch.zeros(4, 6).double())


# Rules


VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"rank": 3}, 3),
        ({"rank": 9}, 5),
        ({"dynamic": "sv_ratio:4"}, 2),
        ({"dynamic": "sv_ratio:4.1"}, 3),
        # Squares 64, 16, 4, 1, 0.25 of 85.25 in all.
        ({"energy": 0.75}, 1),
        ({"energy": 0.76}, 2),
        ({"energy": 1}, 5),
        ({"dynamic": "sv_fro:0.866"}, 1),
        ({"dynamic": "sv_fro:0.87"}, 2),
        # Sums 8, 12, 14, 15, 15.5.
        ({"dynamic": "sv_cumulative:0.5"}, 1),
        ({"dynamic": "sv_cumulative:0.9"}, 3),
        ({"dynamic": "sv_cumulative:1"}, 5),
        ({"dynamic": "sv_cumulative:1", "rank": 2}, 2),
        ({"dynamic": "sv_cumulative:0.5", "rank": 2}, 1),
    ],
)
def test_rules(options, rank):
    rule = RankRule.of(**options)
    assert rule.choose(VALUES.double()) == rank
    assert rule.choose(torch.zeros(4).double()) >= 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give --rank"),
        ({"rank": 0}, "--rank 0"),
        ({"rank": -3}, "--rank -3"),
        ({"energy": 0}, "--energy 0"),
        ({"energy": 1.5}, "--energy 1.5"),
        ({"energy": float("nan")}, "--energy nan"),
        ({"energy": 0.5, "dynamic": "sv_fro:0.5"}, "one of them"),
        ({"dynamic": "sv_fro"}, "a share between 0 and 1"),
        ({"dynamic": "sv_fro:2"}, "a share between 0 and 1"),
        ({"dynamic": "sv_ratio:0.5"}, "a number above 1"),
        ({"dynamic": "sv_ratio:inf"}, "a number above 1"),
        ({"dynamic": "sv_sum:0.5"}, "use one of sv_ratio"),
    ],
)
def test_refused_rules(options, text):
    with pytest.raises(UserError, match=text):
        RankRule.of(**options)


# Files


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [2.0, 8.0])
def test_each_module_is_its_best_approximation(tmp_path, dtype, alpha):
    metadata = {"ss_network_dim": "8", "ss_network_module": "networks.lora_anima"}
    source = write_network(
        tmp_path / "a.safetensors", rank=8, alpha=alpha, dtype=dtype, metadata=metadata
    )
    out = tmp_path / "b.safetensors"
    losses = resize_file(source, out, RankRule(3))
    old, new = read_lora(source)[0], read_lora(out)[0]
    assert old.keys() == new.keys() and len(losses) == 30
    for loss in losses:
        before, after = old[loss.name], new[loss.name]
        assert (after.rank, loss.rank, loss.old_rank) == (3, 3, 8)
        # The scale is that of the old file.
        assert after.alpha.item() == 3 * alpha / 8 and after.up.dtype == dtype
        whole = before.matrix().double()
        best = torch.linalg.svdvals(whole)[3:].norm().item()
        lost = (after.matrix().double() - whole).norm().item()
        assert lost == pytest.approx(best, rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
        assert (loss.lost, loss.norm) == pytest.approx((lost, whole.norm().item()), rel=1e-4)
    found = metadata_of(out)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("3", f"{3 * alpha / 8:g}")
    assert found["ss_network_module"] == "networks.lora_anima"
    assert "rank 3" in found["ss_training_comment"]
    assert found["sshs_model_hash"] != metadata_of(source)["sshs_model_hash"]


def test_a_network_of_lower_rank_than_its_matrices_loses_nothing(tmp_path):
    source = write_network(tmp_path / "a.safetensors", rank=8)
    tensors = load_file(source)
    for key, tensor in tensors.items():
        if key.endswith("lora_up.weight"):
            tensor[:, 2:] = tensor[:, :2] @ torch.ones(2, 6)
    save_file(tensors, source)
    losses = resize_file(source, tmp_path / "b.safetensors", RankRule(2))
    assert total_error(losses) < 1e-6
    by_energy = resize_file(source, tmp_path / "c.safetensors", RankRule.of(energy=0.9999))
    assert {loss.rank for loss in by_energy} == {2}


def test_modules_of_lower_rank_stay_bit_for_bit(tmp_path):
    source = write_network(
        tmp_path / "a.safetensors", rank=8, reg_dims={r".*\.mlp\..*": 2}, dialect="comfyui"
    )
    out = tmp_path / "b.safetensors"
    losses = {loss.name: loss for loss in resize_file(source, out, RankRule(4))}
    old, new = load_file(source), load_file(out)
    same = [key for key in old if ".mlp." in key]
    assert same and all(torch.equal(old[key], new[key]) for key in same)
    assert losses["blocks.0.mlp.layer1"].lost == 0 and losses[Q].lost > 0
    assert metadata_of(out)["ss_network_dim"] == "Dynamic"


@pytest.mark.parametrize("dora", [None, "outputs"])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_networks_become_lora(tmp_path, kind, dora):
    metadata = {"ss_network_module": f"networks.{kind}", "ss_network_args": '{"factor": "8"}'}
    source = write_network(tmp_path / "a.safetensors", kind=kind, dora=dora, metadata=metadata)
    out = tmp_path / "b.safetensors"
    losses = {loss.name: loss for loss in resize_file(source, out, RankRule(5))}
    old, new = read_lora(source)[0], read_lora(out)[0]
    for name, before in old.items():
        after = new[name]
        assert (after.kind, after.rank, after.scale) == (LORA, 5, 1)
        values = torch.linalg.svdvals(before.matrix().double())
        lost = (after.matrix().double() - before.matrix().double()).norm().item()
        assert lost == pytest.approx(values[5:].norm().item(), rel=1e-3, abs=1e-6)
        assert losses[name].lost == pytest.approx(lost, rel=1e-3, abs=1e-6)
        if dora:
            assert torch.equal(after.dora_scale, before.dora_scale)
    found = metadata_of(out)
    module = "lycoris.kohya" if dora else "networks.lora_anima"
    assert (found["ss_network_module"], found["ss_network_args"]) == (module, "{}")


def test_form_and_dialect_stay(tmp_path):
    source = write_network(tmp_path / "a.safetensors", rank=8, alpha=2)
    folded, out = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    convert_file(source, folded, to="diffusers")
    resize_file(folded, out, RankRule(4), precision="bf16")
    parts, dialect, metadata = read_lora(out)
    assert dialect == "diffusers" and FOLDED in metadata
    assert parts[Q].alpha is None and parts[Q].up.dtype == torch.bfloat16
    resize_file(source, tmp_path / "d.safetensors", RankRule(4))
    plain = read_lora(tmp_path / "d.safetensors")[0][Q]
    torch.testing.assert_close(parts[Q].matrix(), plain.matrix(), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("alpha", [torch.tensor(3.3, dtype=torch.bfloat16), torch.tensor(0.0)])
def test_alphas_of_few_bits_and_of_zero(alpha):
    part = LoRADelta(rand(7, 64).float(), rand(48, 7).float(), alpha=alpha)
    new, loss = resize_delta(Q, part, RankRule(5))
    values = torch.linalg.svdvals(part.matrix().double())
    lost = (new.matrix() - part.matrix()).norm().item()
    assert lost == pytest.approx(values[5:].norm().item(), rel=1e-4, abs=1e-6)
    assert loss.lost == pytest.approx(lost, rel=1e-4, abs=1e-6)
    assert new.alpha.dtype == alpha.dtype


def test_raising_a_rank_is_refused(tmp_path):
    source = write_network(tmp_path / "a.safetensors", rank=4)
    out = tmp_path / "b.safetensors"
    for rank in (4, 5, 64):
        with pytest.raises(UserError, match="has rank 4 already"):
            resize_file(source, out, RankRule(rank))
    with pytest.raises(UserError, match="one of the inputs"):
        resize_file(source, source, RankRule(2))
    with pytest.raises(UserError, match="--precision int8"):
        resize_file(source, out, RankRule(2), precision="int8")
    assert not out.exists()
    # A network of another kind has no rank that could be compared.
    other = write_network(tmp_path / "c.safetensors", kind="loha", rank=2)
    assert total_error(resize_file(other, out, RankRule(8))) < 1e-6


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    source = write_network(tmp_path / "a.safetensors", rank=4)
    tensors = load_file(source)
    next(iter(t for k, t in tensors.items() if "up" in k))[0, 0] = float("nan")
    save_file(tensors, source)
    with pytest.raises(UserError, match="not finite"):
        resize_file(source, tmp_path / "b.safetensors", RankRule(2))


# What is told


def test_report():
    losses = [
        ModuleLoss("blocks.0.mlp.layer1", 3.0, 0.3, 4, 8),
        ModuleLoss("blocks.1.mlp.layer1", 4.0, 0.0, 2, 8),
        ModuleLoss("llm_adapter.blocks.0.mlp.0", 0.0, 0.0, 1, 8),
    ]
    assert total_error(losses) == pytest.approx(0.3 / 5)
    text = "\n".join(loss_table(losses))
    assert (
        "blocks.*.mlp.layer1" in text and "2 to 4" in text and "llm_adapter.blocks.*.mlp.0" in text
    )
    assert "largest error: 10 % in blocks.0.mlp.layer1" in text
    assert "error of the whole: 6 % of the norm" in text
    assert "blocks.1.mlp.layer1" in "\n".join(loss_table(losses, verbose=True))


def test_command(tmp_path):
    source = write_network(tmp_path / "a.safetensors", rank=8)
    out = tmp_path / "b.safetensors"
    words = ["resize", str(source), "--output", str(out)]
    result = CliRunner().invoke(app, [*words, "--dynamic", "sv_fro:0.9", "--rank", "6"])
    assert result.exit_code == 0 and "error of the whole" in result.output
    assert max(part.rank for part in read_lora(out)[0].values()) <= 6
    for more in ([], ["--rank", "8"], ["--energy", "2"], ["--dynamic", "x"]):
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1
