"""Every kernel compiled for every supported card: no spills, within each card's limits."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anima_fast.bench import resources
from anima_fast.bench.choice import parse_choice
from anima_fast.bench.dry import dry_launches
from anima_fast.bench.interpreter import interpreting
from anima_fast.bench.resources import (
    ARCHS,
    COMPILED,
    FULL_ARCH,
    LIMITS,
    SHORTER,
    Resources,
    check,
    occupancy,
    tokens_for,
)
from anima_fast.bench.run import wrong
from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.kernels.dispatch import SHARED_KIB
from anima_fast.kernels.registry import OPS

ROOT = Path(__file__).parent.parent
GOOD = Resources(
    op="an_op", kernel="_kernel", arch=89, dtype="bfloat16", config="D=64", registers=128,
    shared_bytes=99 * 1024, warps=4, stages=3, grid=(70000, 2), occupancy=0.25,
)  # fmt: skip


def compiled(*words):
    """What a process in which kernels are compiled prints, as JSON."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_every_kernel_on_every_card(which):
    """The slow one compiles float32, float16 and sums of 32 terms for every card too."""
    found = compiled(ROOT / "tests" / "greedy_ops.py", which)
    assert not found["problems"], "\n".join(found["problems"])
    rows = found["kernels"]
    wanted = {(op, arch) for op in COMPILED for arch in ARCHS}
    wanted |= {(op, arch) for op in SHORTER for arch in (ARCHS if which == "all" else [FULL_ARCH])}
    missing = wanted - {(r["op"], r["arch"]) for r in rows}
    assert not missing, "no kernel of these ops was compiled for these cards"
    for row in rows:
        assert not row["spill_bytes"], row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_KIB[row["arch"]] * 1024, row
        assert 0 < row["occupancy"] <= 1, row
    for name, op in (COMPILED | SHORTER).items():
        dtypes = {str(dtype).removeprefix("torch.") for dtype in op.dtypes}
        assert {r["dtype"] for r in rows if r["op"] == name} == dtypes, name
    for name in SHORTER:
        assert any("SHORT_SUMS=32" in r["config"] for r in rows if r["op"] == name), name
        assert not any("SHORT_SUMS=64" in r["config"] for r in rows if r["op"] == name), name


@pytest.mark.parametrize(
    "words",
    [("89", "90", "100"), pytest.param(("block", *map(str, ARCHS)), marks=pytest.mark.slow)],
    ids=["quick", "all"],
)
def test_short_sums_are_where_the_kernels_say(words):
    """Of each product by the type of its sums; the slow one has the block's too.

    On 9.0 and 10.0 the pipeline may have the products of a step twice in the code.
    """
    found = compiled(ROOT / "tests" / "short_sums_code.py", *words)
    # Logits in float32; p v; do v, pᵀ do, dsᵀ q; do v, ds k. Each whole: no part is left out.
    expected = {
        "_attention_fwd": {"F32": 1, "F16": 1},
        "_attention_bwd_dkdv": {"F32": 1, "F16": 3},
        "_attention_bwd_dq": {"F32": 1, "F16": 2},
    }
    short = [row for row in found if row["short"]]
    archs = {int(word) for word in words if word.isdecimal()}
    kernels = {(row["kernel"], row["arch"]) for row in short}
    assert kernels == {(name, arch) for name in (*expected, "_gemm") for arch in archs}
    for row in found:
        assert not row["spills"], row
        if not row["short"]:
            assert row["kernel"] == "_gemm" and not row["adapter"] and set(row["sums"]) == {"F32"}
        elif row["kernel"] == "_gemm":
            assert set(row["sums"]) == {"F16"}, row
        else:
            copies = (1, 2) if row["arch"] in (90, 100) else (1, 1)
            assert row["sums"].keys() == {"F32", "F16"}, row
            for kind, count in expected[row["kernel"]].items():
                assert copies[0] * count <= row["sums"][kind] <= copies[1] * count, row


def test_greedy_kernels_are_found():
    found = compiled(ROOT / "tests" / "greedy_ops.py")
    spill, greed, grid, broken = found["problems"]
    assert spill.startswith("spill sm_89 bfloat16 _spill N=4096: spills ")
    assert greed.startswith("greed sm_89 bfloat16 _greed N=128: wants ") and "shared" in greed
    assert "beyond 65535" in grid
    assert broken.startswith("broken sm_89 bfloat16") and "does not compile" in broken
    assert "never compiles" in broken
    kernels = {row["op"]: row for row in found["kernels"]}
    assert kernels["spill"]["registers"] <= 32 and kernels["spill"]["spill_bytes"] > 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"registers": 255}, None),
        ({"spill_bytes": 8}, "spills 8 bytes a thread"),
        ({"shared_bytes": 99 * 1024 + 1}, "wants 101377 bytes of shared memory of 101376"),
        ({"arch": 90, "shared_bytes": 227 * 1024}, None),
        ({"arch": 80, "shared_bytes": 164 * 1024}, "wants 167936 bytes of shared memory"),
        ({"registers": 256}, "wants 256 registers of 255"),
        ({"tensor_columns": 513}, "wants 513 tensor columns of 512"),
        ({"grid": (1, 65536)}, "beyond 65535 in y or z"),
        ({"occupancy": 0.0}, "does not fit a multiprocessor"),
        ({"error": "ValueError: x"}, "does not compile: ValueError: x"),
    ],
)
def test_check(change, problem):
    found = check([GOOD, replace(GOOD, **change)])
    assert len(found) == (problem is not None)
    if problem:
        assert found[0].startswith("an_op sm_") and problem in found[0]


@pytest.mark.parametrize(
    ("arch", "kernel", "warps"),
    [
        # 128 registers are 4096 a warp, so 16 warps; 33 KiB with the reserved one, so 3 blocks.
        (89, {"registers": 128, "warps": 4, "shared_bytes": 32 * 1024}, 12),
        # The same in 228 KiB: 6 blocks by shared memory, 4 by registers.
        (90, {"registers": 128, "warps": 4, "shared_bytes": 32 * 1024}, 16),
        # 255 registers are 8160 a warp, 8192 allocated: 8 warps.
        (80, {"registers": 255, "warps": 8, "shared_bytes": 0}, 8),
        # 96 registers are 3072 a warp: 21 warps, in groups of four 20, 2 blocks of 8.
        (80, {"registers": 96, "warps": 8, "shared_bytes": 0}, 16),
        # Few registers: limited by blocks, 16 of 1 warp on 8.6 and 24 on 8.9.
        (86, {"registers": 16, "warps": 1, "shared_bytes": 0}, 16),
        (89, {"registers": 16, "warps": 1, "shared_bytes": 0}, 24),
        # All 48 warps of 32 registers; of 48 registers 40 warps, so 2 blocks of 16.
        (120, {"registers": 32, "warps": 4, "shared_bytes": 0}, 48),
        (120, {"registers": 48, "warps": 16, "shared_bytes": 0}, 32),
        # Tensor memory: 256 of 512 columns, so 2 blocks.
        (100, {"registers": 64, "warps": 4, "shared_bytes": 0, "tensor_columns": 256}, 8),
        # One byte more than half of what remains is in the way of the second block.
        (89, {"registers": 64, "warps": 4, "shared_bytes": 49 * 1024}, 8),
        (89, {"registers": 64, "warps": 4, "shared_bytes": 49 * 1024 + 1}, 4),
        # 16 warps of 255 registers do not fit.
        (80, {"registers": 255, "warps": 16, "shared_bytes": 0}, 0),
    ],
)
def test_occupancy(arch, kernel, warps):
    assert occupancy(arch, **kernel) == warps / LIMITS[arch].warps


def test_every_capability_has_both_limits():
    assert LIMITS.keys() == SHARED_KIB.keys()
    assert set(ARCHS) <= LIMITS.keys()
    for arch, limits in LIMITS.items():
        # One block may use all but what the system keeps.
        assert SHARED_KIB[arch] == limits.shared_kib - (1 if arch >= 80 else 0)


def test_plan():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    dtypes = (fp32, fp16, bf16)
    assert tokens_for(bf16, dtypes, full=True, quick=True) == (1024, 2304, 4096, 9216)
    assert tokens_for(bf16, dtypes, full=False, quick=True) == (1024, 4096)
    assert tokens_for(fp16, dtypes, full=False, quick=True) == ()
    assert tokens_for(fp16, dtypes, full=True, quick=True) == (4096,)
    assert tokens_for(fp16, dtypes, full=False, quick=False) == (1024, 4096)
    assert tokens_for(fp32, dtypes, full=True, quick=False) == (4096,)
    # An op of float32 alone is tried on every card.
    assert tokens_for(fp32, (fp32,), full=False, quick=True) == (4096,)


@pytest.mark.skipif(not interpreting(), reason="kernels are compiled here")
def test_interpreted_kernels_are_refused():
    with pytest.raises(UserError, match="unset TRITON_INTERPRET"), dry_launches(89):
        pass


@pytest.mark.parametrize(("change", "problems"), [({}, 0), ({"spill_bytes": 4}, 1)])
def test_rows_of_a_run(monkeypatch, change, problems):
    calls = []

    def measure(**given):
        calls.append(given)
        return [GOOD, replace(GOOD, config="D=128", registers=40, **change)]

    monkeypatch.setattr(resources, "measure", measure)
    name = next(iter(OPS))
    choice = parse_choice([name], archs=["rtx-4090", "90", "4080"], cases=["L=7"])
    (found,) = resources.rows(choice)
    (given,) = calls
    assert given["ops"][name].function == OPS[name].function
    assert (given["archs"], given["sizes"], given["quick"]) == ((89, 90), {"L": 7}, False)
    rows = {row.metric: row for row in found}
    assert rows["registers"].value == 128 and rows["registers"].parts == {"D=64": 128, "D=128": 40}
    assert rows["spills"].value == (4 if problems else 0)
    assert rows["occupancy"].case == "_kernel L=7" and rows["occupancy"].mode == "sm_89"
    assert len(wrong(found)) == problems and all("spills 4 bytes" in why for why in wrong(found))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "OP nothing: use one of"),
        (["--arch", "rtx-4091"], "rtx-4090"),
        (["--arch", "70"], "--arch 70 is unknown"),
    ],
)
def test_command_refuses(words, message):
    done = CliRunner().invoke(app, ["bench", "run", *words])
    assert done.exit_code == 2, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_help_imports_nothing_heavy():
    check = (
        "import sys, anima_fast.cli as cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules)\n"
    )
    for words in (["bench", "--help"], ["bench", "run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", check, *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
