"""The launches, traffic and memory of one block on a card, counted without one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_block import kept_bytes
from tiny_dit import TINY

from anima_fast.bench import launches
from anima_fast.bench.choice import Choice
from anima_fast.bench.launches import BlockLaunches, BlockSizes, block_launches
from anima_fast.bench.pretend import Card, pretended
from anima_fast.bench.recorder import Launched, Recorder
from anima_fast.bench.ttir import accesses, has_product, touched
from anima_fast.errors import UserError

ROOT = Path(__file__).parent.parent
UNIT = BlockSizes().unit

# Of one block at 1024x1024, rank 32, bfloat16, compute capability 8.9: launches, then tensors
# [L, D] that are read and written, forward and backward; then kept, and the peaks of forward,
# backward and both. A change of any is a change of the block, to be defended in its commit.
BLOCK = {
    "eager": (165, 207, 272.9097, 398.9168, 29.633, 34.442, 8.945, 38.441),
    "own none": (38, 79, 95.0115, 162.4701, 13.343, 21.399, 13.492, 25.696),
    "own mlp": (38, 82, 95.0115, 178.5404, 9.327, 21.399, 17.508, 25.696),
    "own block": (38, 116, 95.0115, 256.8957, 1.139, 21.399, 28.696, 28.696),
    "own none triton-attention": (31, 77, 88.8865, 146.1732, 13.343, 21.399, 12.633, 24.837),
}
# Whose launches they are where the program runs as it comes.
BY_WHOM = {"triton": 22, "cublas": 52, "flash": 8, "torch": 35}


@pytest.fixture(scope="module")
def found():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "launch_rows.py"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("provider", BLOCK)
def test_a_block_launches_and_moves_what_it_did(found, provider):
    rows = found["block"][provider]
    counted = [rows[f"launches {mode}"]["value"] for mode in ("fwd", "bwd")]
    counted += [rows[f"units {mode}"]["value"] for mode in ("fwd", "bwd")]
    memory = ("kept", "peak fwd", "peak bwd", "peak both")
    counted += [round(rows[name]["value"] / UNIT, 3) for name in memory]
    assert tuple(counted) == BLOCK[provider]


def test_every_provider_is_pinned(found):
    assert found["block"].keys() == BLOCK.keys()


def test_whose_launches_they_are(found):
    by = dict.fromkeys(BY_WHOM, 0)
    for name, count in found["block"]["own none"]["launches both"]["parts"].items():
        by[name.split()[0]] += count
    assert by == BY_WHOM


@pytest.mark.parametrize("metric", ["launches", "units"])
def test_parts_and_directions_add_up(found, metric):
    for rows in found["block"].values():
        for mode in ("fwd", "bwd", "both"):
            row = rows[f"{metric} {mode}"]
            assert sum(row["parts"].values()) == pytest.approx(row["value"], abs=0.01)
        sides = [rows[f"{metric} {mode}"]["value"] for mode in ("fwd", "bwd")]
        assert sum(sides) == pytest.approx(rows[f"{metric} both"]["value"], abs=1e-3)


def test_a_row_says_what_it_is(found):
    row = found["block"]["own mlp"]["kept"]
    assert (row["op"], row["case"]) == ("block", "B=1 L=4096 S=96 D=2048 R=32")
    assert (row["provider"], row["unit"], row["source"]) == ("own mlp", "bytes", "compiler")
    assert (row["dtype"], row["note"]) == ("bfloat16", "sm_89: 9.33 tensors [B, L, D]")


def test_one_more_launch_shows(found):
    plain, planted = found["plain"], found["planted launch"]
    name = "triton _gate_residual_fwd"
    for mode, more in (("fwd", 1), ("bwd", 0)):
        old, new = (rows[f"launches {mode}"] for rows in (plain, planted))
        assert new["value"] == old["value"] + more
        assert new["parts"].get(name, 0) == old["parts"].get(name, 0) + more
    # It reads two tensors and writes one.
    assert planted["units fwd"]["value"] - plain["units fwd"]["value"] == pytest.approx(3, abs=0.05)
    assert planted["kept"]["value"] == plain["kept"]["value"]


def test_one_more_kept_tensor_shows(found):
    plain, planted = found["plain"], found["planted kept"]
    more = 64 * TINY.model_channels * 2
    assert planted["kept"]["value"] == plain["kept"]["value"] + more
    assert planted["launches both"] == plain["launches both"]


@pytest.mark.parametrize("policy", ["none", "mlp", "block"])
def test_kept_is_what_autograd_saves(found, policy):
    """Tensors with values, on a CPU, count the same to the byte."""
    config = replace(TINY, num_blocks=1)
    saved = kept_bytes(policy, config=config, side=8, rows=24)
    assert found["small"][policy]["kept"]["value"] == saved


def test_libraries_follow_the_card(found):
    def whose(rows):
        return {name.split()[0] for name in rows["launches both"]["parts"]} - {"torch", "cublas"}

    assert whose(found["cards"]["hopper"]) == {"triton", "flash", "cudnn"}
    assert whose(found["cards"]["windows"]) == {"triton"}


def test_everything_is_restored(found):
    """Also when the block fails."""
    assert found["restored"]


@pytest.mark.parametrize("provider", ["own", "own all", "eager none", "ours none"])
def test_an_unknown_provider_is_refused(provider):
    with pytest.raises(UserError, match="unknown: use one of eager, own none"):
        block_launches(provider)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="--arch 88 is unknown: use one of 75, 80"):
        block_launches("own none", card=Card(88))


def test_a_choice_selects_rows(monkeypatch):
    asked = []

    def counted(provider, sizes, card):
        asked.append((provider, sizes, card))
        one = Launched("cublas mm", "fwd", 3 * sizes.unit, sizes.unit)
        return BlockLaunches(provider, card, sizes, (one,), 7, {"fwd": 1, "bwd": 2, "both": 3})

    monkeypatch.setattr(launches, "block_launches", counted)
    choice = Choice(providers=("own",), metrics=("units", "kept"), modes=("both",), archs=(90,),
                    sizes={"L": 64, "S": 7, "K": 1}, dtypes=("float16",))  # fmt: skip
    found = [row for rows in launches.rows(choice) for row in rows]
    sizes = BlockSizes(tokens=64, text=7, dtype=torch.float16)
    own = [name for name in launches.PROVIDERS if name.startswith("own")]
    assert asked == [(name, sizes, Card(90)) for name in own]
    assert [(row.metric, row.mode, row.value) for row in found[:2]] == [
        ("units", "both", 4), ("kept", "", 7),
    ]  # fmt: skip
    assert len(found) == 2 * len(own)
    everything = [row for rows in launches.rows(Choice()) for row in rows]
    assert len(everything) == 10 * len(launches.PROVIDERS)
    assert asked[-1][1:] == (BlockSizes(), Card())
    title, text = launches.timeline(Choice())
    assert title.startswith("own none, B=1 L=4096 S=96 D=2048 R=32, sm_89: 1 launches")
    assert text.splitlines()[1].split() == ["fwd", "cublas", "mm", "3.00", "1.00", "0.0"]
    assert len(list(launches.timeline(choice))) == 2 * len(own)


def test_interpreted_kernels_are_refused(monkeypatch):
    """There is no code to read in them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="unset TRITON_INTERPRET"):
        block_launches("own none")


def test_a_pretended_card_is_gone_afterwards():
    x = torch.empty(1, device="meta")
    with pytest.raises(KeyError), pretended(Card(90)):
        assert x.is_cuda and torch.cuda.get_device_capability() == (9, 0)
        assert not torch.empty(1).is_cuda
        raise KeyError
    assert not x.is_cuda and "is_cuda" not in vars(torch.Tensor)


def test_operators_count_each_tensor_once():
    """In bytes; a new result is written, and what is overwritten is not read."""
    a, b = (torch.empty(8, 4, device="meta") for _ in range(2))
    row = torch.empty(4, device="meta")
    recorder = Recorder()
    with recorder:
        a + b
        a.add_(b)
        a.copy_(row)
        a + row.expand(8, 4)
        a.view(4, 8).zero_()
        c = a @ b.T
        torch.addmm(c, a, b.T, beta=0, out=c)
        c.addmm_(a, b.T)
        torch._foreach_copy_([a], [b])
        torch.nn.functional.pad(a, (0, 4))
    size = 8 * 4 * 4
    whole, product = (2 * size, size), (2 * size, 8 * 8 * 4)
    expected = [
        ("torch add", *whole), ("torch add_", *whole), ("torch copy_", 16, size),
        ("torch add", size + 16, size), ("torch zero_", 0, size), ("cublas mm", *product),
        ("cublas addmm", *product), ("cublas addmm", 2 * size + 256, 256),
        ("torch _foreach_copy_", size, size), ("torch constant_pad_nd", 0, 2 * size),
        ("torch constant_pad_nd", size, size),
    ]  # fmt: skip
    assert [(x.name, x.read, x.written) for x in recorder.launches] == expected
    assert [x.operations for x in recorder.launches if x.operations] == [2 * 8 * 8 * 4] * 3


def test_memory_counts_what_is_held():
    recorder = Recorder()
    given = torch.empty(100, device="meta")
    with recorder:
        a = given + 1
        b = a.view(10, 10)[2:]
        del a
        assert recorder.living() == 400, "a view holds it, what was there before does not count"
        del b
        assert recorder.living() == 0
        c = given * 2
        assert recorder.watch() == 400
        d = c + c
        del c
        given - d
    assert recorder.living() == 400 and recorder.peak == 400


CODE = """
module {
  tt.func public @_kernel(%X: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("X"(#loc)), %I: !tt.ptr<i32> loc("I"(#loc)), %Y: !tt.ptr<f32> loc("Y"(#loc)), %Z: !tt.ptr<f32> loc("Z"(#loc)), %U: !tt.ptr<f32> loc("U"(#loc)), %n: i32 loc("n"(#loc))) attributes {noinline = false} {
    %r = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc1)
    %i = tt.load %I : !tt.ptr<i32> loc(#loc2)
    %p = tt.addptr %X, %i : !tt.ptr<bf16>, i32 loc(#loc2)
    %q = tt.splat %p : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>> loc(#loc2)
    %y = tt.splat %Y : !tt.ptr<f32> -> tensor<2x32x!tt.ptr<f32>> loc(#loc2)
    %s:2 = scf.for %k = %c0 to %n step %c1 iter_args(%at = %q, %sum = %r) -> (tensor<64x!tt.ptr<bf16>>, tensor<64xi32>)  : i32 {
      %x = tt.load %at, %m, %o : tensor<64x!tt.ptr<bf16>> loc(callsite(#loc3 at #loc4))
      %next = tt.addptr %at, %r : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc5)
      scf.yield %next, %sum : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc5)
    } loc(#loc5)
    tt.store %s#0, %r, %m : tensor<64x!tt.ptr<bf16>> loc(#loc6)
    %w = scf.if %c -> (!tt.ptr<f32>) {
      scf.yield %Y : !tt.ptr<f32> loc(#loc7)
    } else {
      scf.yield %Z : !tt.ptr<f32> loc(#loc7)
    } loc(#loc7)
    %old = tt.atomic_rmw fadd, acq_rel, gpu, %w, %v, %true : (!tt.ptr<f32>, f32, i1) -> f32 loc(#loc8)
    tt.store %y, %v : tensor<2x32x!tt.ptr<f32>> loc(#loc9)
    tt.return loc(#loc10)
  } loc(#loc)
} loc(#loc)
"""  # noqa: E501


def test_pointers_are_followed():
    """Through loops, branches and atomics; an index that was loaded is no pointer."""
    found = accesses(CODE, ["X", "I", "Y", "Z", "U", "n"])
    sizes = {name: (access.read, access.written) for name, access in found.items()}
    assert sizes == {"X": (float("inf"), 64), "I": (1, 0), "Y": (1, 65), "Z": (1, 1)}
    assert touched(found["X"], 1000, 4) == (1000, 256)
    assert not has_product(CODE)
