"""Networks moved between DiT of other depths: what goes where, and that it computes alike."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dit import TINY, dit_weights, make_inputs, relative_error
from typer.testing import CliRunner

from anima_fast.adapters.deltas import LoRADelta
from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.lora import add_lora
from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.models.dit import load_dit
from anima_fast.tools.block_maps import EXPANSIONS, given_map, known_map
from anima_fast.tools.remap import remap_file

LAYERS = ("self_attn.q_proj", "mlp.layer2")


def write_network(path, blocks, dora=False, **more):
    """A LoRA on two layers of some blocks, each block with its own numbers."""
    from anima_fast.adapters.formats import write_lora

    parts = {
        f"blocks.{block}.{layer}": LoRADelta(
            torch.full((2, 8), block + 1.0), torch.full((8, 2), i + 1.0), alpha=torch.tensor(1.0),
            dora_scale=torch.ones(8, 1) if dora else None,
        )
        for block in blocks
        for i, layer in enumerate(LAYERS)
    }  # fmt: skip
    write_lora(path, parts | more, "kohya", metadata={"ss_network_dim": "2"})
    return path


def blocks_of(path):
    """{block: the block that its numbers came from}"""
    parts = read_lora(path)[0]
    return {
        int(name.split(".")[1]): int(part.down[0, 0].item()) - 1
        for name, part in parts.items()
        if name.startswith("blocks.")
    }


def test_published_insertions():
    """Blocks that were there keep their order; inserted ones come behind their origin."""
    for (small, large), inserted in EXPANSIONS.items():
        found = known_map(small, large)
        assert list(found.same.values()) == list(range(small)) and len(inserted) == large - small
        assert set(found.same) | set(found.copies) == set(range(large))
        assert not set(found.same) & set(found.copies)
        for block, origin in found.copies.items():
            below = max(b for b in found.same if b < block)
            assert found.same[below] == origin, block


def test_two_expansions_in_a_row():
    direct, first, second = known_map(28, 52), known_map(28, 40), known_map(40, 52)
    assert direct.same == {large: first.same[b] for large, b in second.same.items()
                           if b in first.same}  # fmt: skip
    back = known_map(52, 28)
    assert {v: k for k, v in back.same.items()} == dict(direct.same)


def test_there_and_back_is_the_same_file(tmp_path):
    source = write_network(tmp_path / "a.safetensors", range(28))
    done = remap_file(source, tmp_path / "b.safetensors", to=40)
    assert len(blocks_of(tmp_path / "b.safetensors")) == 28
    assert not any("left out" in line for line in done)
    assert blocks_of(tmp_path / "b.safetensors") == dict(known_map(28, 40).same)
    remap_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to=28)
    one, other = load_file(source), load_file(tmp_path / "c.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_what_was_trained_in_inserted_blocks_is_named_when_it_is_left_out(tmp_path):
    source = write_network(tmp_path / "a.safetensors", range(40))
    done = remap_file(source, tmp_path / "b.safetensors", to=28)
    dropped = ", ".join(map(str, sorted(EXPANSIONS[28, 40])))
    assert f"  left out: blocks {dropped}, which the target does not have" in done
    assert len(blocks_of(tmp_path / "b.safetensors")) == 28


def test_copies_get_a_share_on_request(tmp_path):
    source = write_network(tmp_path / "a.safetensors", range(28))
    remap_file(source, tmp_path / "b.safetensors", to=40, duplicate=0.5)
    parts = read_lora(tmp_path / "b.safetensors")[0]
    assert len(parts) == 40 * len(LAYERS)
    for block, origin in EXPANSIONS[28, 40].items():
        twin = next(b for b, o in known_map(28, 40).same.items() if o == origin)
        own, other = parts[f"blocks.{block}.mlp.layer2"], parts[f"blocks.{twin}.mlp.layer2"]
        torch.testing.assert_close(own.matrix(), 0.5 * other.matrix())


def test_the_deeper_dit_computes_as_the_shallow_one(tmp_path):
    """With inserted blocks that add nothing, as they start, the network means the same."""
    weights = dit_weights(TINY)
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    names = {k.split(".", 2)[2] for k in weights if k.startswith("blocks.0.")}
    deeper = {k: v for k, v in weights.items() if not k.startswith("blocks.")}
    # Block 1 is a copy of block 0 whose results are zero.
    for block in range(depth + 1):
        origin = 0 if block == 1 else block - (block > 1)
        for name in names:
            value = weights[f"blocks.{origin}.{name}"]
            silent = block == 1 and name.split(".")[-2] in ("output_proj", "layer2")
            deeper[f"blocks.{block}.{name}"] = value * 0 if silent else value.clone()
    shallow, inputs = load_dit(weights, dtype=torch.float32), make_inputs()
    network = add_lora(shallow, rank=2, seed=1).eval()
    network.flat.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    expected = shallow(*inputs)
    network.save(tmp_path / "a.safetensors")
    manifest = {"old_block_count": depth, "new_block_count": depth + 1,
                "inserted_to_source": {"1": 0}}  # fmt: skip
    (tmp_path / "map.json").write_text(json.dumps(manifest), encoding="utf-8")
    out = tmp_path / "b.safetensors"
    remap_file(tmp_path / "a.safetensors", out, source=depth, mapping=str(tmp_path / "map.json"))
    deep = load_dit(deeper, dtype=torch.float32)
    add_lora(deep, modules_from=read_lora(out)[0]).eval()
    assert relative_error(deep(*inputs), expected) < 1e-5


def test_other_depths_are_spaced_evenly():
    found = known_map(4, 10)
    assert found.same == {0: 0, 3: 1, 6: 2, 9: 3} and "not a published" in found.origin


def test_maps_by_hand(tmp_path):
    found = given_map("0=0,1=1*0.5,3=0", 2, None)
    assert (found.target, dict(found.same), found.strengths) == (4, {0: 0, 1: 1, 3: 0}, {1: 0.5})
    (tmp_path / "m.txt").write_text("0=1\n1=0\n", encoding="utf-8")
    assert given_map(str(tmp_path / "m.txt"), 2, 2).same == {0: 1, 1: 0}
    source = write_network(tmp_path / "a.safetensors", range(2))
    remap_file(source, tmp_path / "b.safetensors", source=2, mapping="0=1*0.5,1=0")
    assert blocks_of(tmp_path / "b.safetensors") == {0: 1, 1: 0}
    parts, before = read_lora(tmp_path / "b.safetensors")[0], read_lora(source)[0]
    half = 0.5 * before["blocks.1.mlp.layer2"].matrix()
    torch.testing.assert_close(parts["blocks.0.mlp.layer2"].matrix(), half)


def test_modules_outside_the_blocks_and_metadata_stay(tmp_path):
    other = {"llm_adapter.blocks.0.mlp.0": LoRADelta(torch.ones(2, 8), torch.ones(8, 2))}
    source = write_network(tmp_path / "a.safetensors", range(28), **other)
    done = remap_file(source, tmp_path / "b.safetensors", to=40)
    parts, _, metadata = read_lora(tmp_path / "b.safetensors")
    assert "llm_adapter.blocks.0.mlp.0" in parts
    assert "  unchanged: 1 modules outside the blocks of the DiT" in done
    assert metadata["ss_network_dim"] == "2" and metadata["anima_fast.remapped"] == "28 to 40"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "give --to"),
        ({"to": 28}, "is for 28 blocks already"),
        ({"to": 40, "source": 10}, "has a block 27"),
        ({"mapping": "0=99"}, "no block 99"),
        ({"mapping": "0=0,0=1"}, "given twice"),
        ({"mapping": "0=0,x"}, "is not a pair"),
        ({"mapping": "nothing.txt"}, "expected pairs"),
        ({"mapping": "99999999=0"}, "numbers below 1000"),
        ({"to": 10**8}, "--to 100000000: use a number"),
        ({"to": 0}, "--to 0: use a number"),
        ({"to": 40, "source": 10**8}, "--from 100000000: use"),
        ({"to": 40, "duplicate": float("nan")}, "--duplicate nan"),
        ({"mapping": "0=0", "to": 40, "source": 28, "dst": "a.safetensors"}, "a.safetensors"),
    ],
)
def test_bad_input_changes_nothing(tmp_path, given, match):
    source = write_network(tmp_path / "a.safetensors", range(28))
    before = source.read_bytes()
    given = dict(given)
    target = tmp_path / given.pop("dst", "b.safetensors")
    with pytest.raises(UserError, match=match):
        remap_file(source, target, **given)
    assert source.read_bytes() == before and not (tmp_path / "b.safetensors").exists()


def test_magnitudes_belong_to_one_block(tmp_path):
    source = write_network(tmp_path / "a.safetensors", range(28), dora=True)
    remap_file(source, tmp_path / "b.safetensors", to=40)
    with pytest.raises(UserError, match="is a DoRA"):
        remap_file(source, tmp_path / "c.safetensors", to=40, duplicate=1.0)


def test_a_model_tells_its_depth_and_refuses_other_widths(tmp_path):
    save_file(dit_weights(TINY), tmp_path / "dit.safetensors")
    source = write_network(tmp_path / "a.safetensors", range(28))
    with pytest.raises(UserError, match="does not fit"):
        remap_file(source, tmp_path / "b.safetensors", model=tmp_path / "dit.safetensors")


def test_the_command_says_what_went_where(tmp_path):
    source = write_network(tmp_path / "a.safetensors", range(28))
    out = tmp_path / "b.safetensors"
    words = ["remap", str(source), "--to", "40", "--output", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "published insertions" in result.output
    assert "blocks 0 to 1 become 0 to 1" in result.output and out.exists()
    result = CliRunner().invoke(app, [*words[:2], "--to", "2", "--output", str(out)])
    assert "left out: blocks 1 to 26, which" in result.output
    result = CliRunner().invoke(app, [*words[:2], "--to", "28", "--output", str(out)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
