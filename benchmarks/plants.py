"""Errors of one line that the suite must see: `python -m benchmarks.plant` plants each of them.

A row is a file, a piece of it that occurs once, its wrong form, and the command that must turn red.
A kernel, a rule or a test that cannot see an error of this kind any more shows here.
"""

from __future__ import annotations

from dataclasses import dataclass

KERNELS, BLOCK = "anima_fast/kernels/", "anima_fast/models/block.py"
COUNTS = "--against benchmarks/baselines/counts.jsonl"


@dataclass(frozen=True)
class Plant:
    """One planted error.

    Attributes:
        name: what it is called.
        file: where it goes, from the root of the checkout.
        right, wrong: a piece of the file that occurs once, and what takes its place.
        check: words of `anima-fast parity`, or "pytest ...", or "bench ...": what must turn red.
        quick: whether it belongs to the part that CI runs.
    """

    name: str
    file: str
    right: str
    wrong: str
    check: str
    quick: bool = False


def _op(module: str, name: str, right: str, wrong: str, check: str, quick: bool = False) -> Plant:
    """An error in a kernel file; `check` is a dtype of the op of its name, or as in `Plant`."""
    words = (
        check if check.startswith(("--op", "pytest", "bench")) else f"--op {module} --dtype {check}"
    )
    return Plant(f"{module}: {name}", f"{KERNELS}{module}.py", right, wrong, words, quick)


PLANTS = (
    # Norms.
    _op("layernorm_modulate", "eps x 10 in forward",
        "x_hat, _ = normalized(x, m_d, D, EPS)", "x_hat, _ = normalized(x, m_d, D, 10 * EPS)",
        "bfloat16"),
    _op("layernorm_modulate", "eps x 3 in forward",
        "x_hat, _ = normalized(x, m_d, D, EPS)", "x_hat, _ = normalized(x, m_d, D, 3 * EPS)",
        "float64 --quick", quick=True),
    _op("layernorm_modulate", "eps x 3 in both directions",
        "/ D + EPS)", "/ D + 3 * EPS)", "float64 --quick"),
    _op("layernorm_modulate", "x_hat rounded before the modulation",
        "x_hat * (1.0 + scale) + shift", "x_hat.to(tl.bfloat16).to(ACC) * (1.0 + scale) + shift",
        "bfloat16 --quick", quick=True),
    _op("layernorm_modulate", "scale and shift swapped",
        "x_hat * (1.0 + scale) + shift", "x_hat * (1.0 + shift) + scale", "float32"),
    _op("layernorm_modulate", "sums of dscale in 16 bit",
        "tl.store(DSCALE + o_part, dscale,", "tl.store(DSCALE + o_part, dscale.to(tl.float16),",
        "float16"),
    _op("layernorm_modulate", "mean of the gradient over the padded row",
        "g - tl.sum(g, 0) / D", "g - tl.sum(g, 0) / (D + 1)", "bfloat16 --quick"),
    _op("rmsnorm", "mean over the padded row",
        "mean = tl.sum(g * x_hat, 1) / D", "mean = tl.sum(g * x_hat, 1) / BLOCK_D", "float16"),
    _op("rmsnorm", "dw of x and not of x_hat",
        "dw += dy * x_hat.to(W.dtype.element_ty).to(ACC)", "dw += dy * x", "bfloat16 --quick"),
    _op("rmsnorm", "dw of an x_hat that is not rounded as forward rounds it",
        "dw += dy * x_hat.to(W.dtype.element_ty).to(ACC)", "dw += dy * x_hat",
        "pytest tests/test_kernel_details.py -k rmsnorm"),
    _op("qk_norm_rope", "the rotation is not undone",
        "g1 * c + g2 * s, g2 * c - g1 * s", "g1 * c - g2 * s, g2 * c + g1 * s", "bfloat16 --quick"),
    _op("qk_norm_rope", "one half rounded once more",
        "y1 = x1 * rstd[:, None] * w1[None, :]",
        "y1 = (x1 * rstd[:, None]).to(tl.bfloat16).to(ACC) * w1[None, :]", "bfloat16 --quick"),
    _op("qk_norm_rope", "the angles of the token before",
        "token, h = o_r // H, o_r % H", "token, h = o_r // (H + 1), o_r % H", "float32"),
    # Residuals.
    _op("gate_residual", "the product rounded before the sum",
        "x + gate * y, o_d", "x + (gate * y).to(OUT.dtype.element_ty).to(ACC), o_d",
        "bfloat16 --quick", quick=True),
    _op("gate_residual", "dgate leaves out the last row of each chunk",
        "tl.minimum(part * chunk + chunk, L)):\n        dout",
        "tl.minimum(part * chunk + chunk, L) - 1):\n        dout", "float32"),
    _op("gate_residual_layernorm_modulate", "dy of a rounded dr",
        "store_row(DX + b * dx_b", "dr = store_row(DX + b * dx_b",
        "bfloat16 --quick"),
    _op("gate_residual_layernorm_modulate", "dgate without the norm's part",
        "dgate += dr * tl.load", "dgate += dh * tl.load", "float16"),
    # Rows with a power of two.
    _op("row_powers", "the power applied twice",
        "mask=m_d, other=0.0).to(ACC) * factor", "mask=m_d, other=0.0).to(ACC) * factor * factor",
        "--op gate_residual_powers --quick", quick=True),
    _op("row_powers", "the power of the row before",
        "power_of_two(tl.load(X + D)", "power_of_two(tl.load(X - _TAIL)",
        "pytest tests/test_row_powers.py -k seam"),
    _op("row_powers", "a row ends where float16 does",
        "_LOWEST), _HIGHEST) - _TOP", "_LOWEST), 15) - _TOP",
        "pytest tests/test_row_powers.py -k any_size"),
    _op("gate_residual_layernorm_modulate", "dx without its power",
        "store_row(DX + b * dx_b + l * dx_l, dr, o_d, m_d, D, POWERS, ACC)",
        "store_row(DX + b * dx_b + l * dx_l, dr, o_d, m_d, D, False, ACC)",
        "pytest tests/test_row_powers.py -k seam"),
    _op("gemm", "saturation not counted",
        "tl.atomic_add(COUNTS + slot, tl.sum(beyond.to(tl.int32)))", "pass",
        "pytest tests/test_half_training.py -k counted"),
    _op("gemm", "saturation counted at another layer",
        "tl.atomic_add(COUNTS + slot,", "tl.atomic_add(COUNTS + slot + 1,",
        "pytest tests/test_half_training.py -k counted"),
    _op("lora_linear", "a weight's power of two left out in dx",
        "dx = _scaled_product(dy, w, weight_scale)", "dx = dy @ w",
        "pytest tests/test_half_training.py -k power_of_two"),
    Plant("run: the loss scale left out", "anima_fast/training/run.py",
          "self.scale(loss).backward()", "loss.backward()",
          "pytest tests/test_half_training.py -k loss_scale"),
    # Attention.
    _op("attention", "the zero keys left out", "l_i += n\n", "l_i += 0 * n\n", "bfloat16 --quick"),
    _op("attention", "no mask in the last tile of keys",
        's = tl.where((start + tl.arange(0, BLOCK_N) < S)[None, :], s, float("-inf"))', "pass",
        "bfloat16 --quick"),
    _op("attention", "the accumulator rounded at every tile of keys",
        "        m_i = m_new\n", "        m_i = m_new\n        acc = acc.to(v.dtype).to(ACC)\n",
        "bfloat16 --quick"),
    _op("attention", "partial sums of dk and dv in 16 bit",
        "like=k, dtype=wide_type)", "like=k, dtype=k.dtype)", "bfloat16 --quick"),
    _op("attention", "dk rounded at every tile of queries",
        "dk = dot_into(dk, ds", "dk = dot_into(dk.to(q.dtype).to(ACC), ds",
        "pytest tests/test_attention.py -k one_program"),
    _op("attention", "delta left out of dq",
        "ds = p * (dp - delta[:, None])", "ds = p * dp", "float32"),
    # Products.
    _op("gemm", "the accumulator rounded at every step along K",
        "        p_x += BLOCK_K * x_k\n",
        "        p_x += BLOCK_K * x_k\n        acc = acc.to(x.dtype).to(ACC)\n",
        "--op lora_linear --dtype bfloat16 --quick", quick=True),
    _op("gemm", "partial sums along K in 16 bit",
        "target = dispatch.empty(split, m, n, like=x, dtype=dispatch.wide_dtype(x))",
        "target = dispatch.empty(split, m, n, like=x)",
        "--op lora_linear --dtype bfloat16 --quick"),
    _op("gemm", "the strength of an adapter left out",
        "        acc *= scale\n    first", "    first", "--op lora_linear --dtype float32"),
    _op("gemm", "the last part along K reads on beyond its end",
        "last = tl.minimum(first + k_split, K)", "last = first + k_split",
        "--op lora_linear --dtype float64 --quick"),
    _op("gemm", "a float32 gradient rounded to 16 bit",
        "like=x, dtype=dtype or x.dtype)", "like=x)",
        "pytest tests/test_block.py -k keep_their_precision"),
    # Short sums.
    _op("sums", "the chains added up in float16",
        "acc += tl.dot(a, b, out_dtype=tl.float16).to(ACC)",
        "acc = tl.dot(a, b, acc.to(tl.float16), out_dtype=tl.float16).to(ACC)",
        "--op lora_linear_short --quick", quick=True),
    _op("attention", "logits in short sums forward",
        "s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)\n"
        "        s = tl.where",
        "s = tl.dot(q, tl.trans(k), out_dtype=tl.float16).to(ACC) * (scale * LOG2E)\n"
        "        s = tl.where", "--op attention_short --quick"),
    _op("attention", "logits in short sums in dkdv",
        "s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * (",
        "s = tl.dot(k, tl.trans(q), out_dtype=tl.float16).to(ACC) * (",
        "--op attention_short --quick"),
    _op("attention", "logits in short sums in dq",
        "s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)\n"
        "        m_n",
        "s = tl.dot(q, tl.trans(k), out_dtype=tl.float16).to(ACC) * (scale * LOG2E)\n"
        "        m_n", "--op attention_short --quick"),
    _op("gemm", "a step along K longer than a chain",
        "Tile(128, 128, chain, 8, 3)", "Tile(128, 128, 2 * chain, 8, 3)",
        "pytest tests/test_sums.py -k one_chain"),
    _op("sums", "do v in one chain over the head",
        "return min(width, chain) if chain else width", "return width",
        "pytest tests/test_sums.py -k backward_sums"),
    _op("sums", "a kernel takes any chain",
        "LONGEST = tl.constexpr(max(CHAINS))", "LONGEST = tl.constexpr(4096)",
        "pytest tests/test_sums.py -k one_chain"),
    _op("lora_linear", "the strength left out of batched adapters",
        "by_part(h, parts), b, alpha=scales[0])", "by_part(h, parts), b)", "bfloat16 --quick"),
    _op("lora_linear", "g without the strength",
        "product(part, ups[i], scales[i], dy.dtype", "product(part, ups[i], 1.0, dy.dtype",
        "float32"),
    _op("gelu", "nine digits of a constant",
        "return 0.5 * a * (1.0 + tl.math.erf(a * 0.7071067811865476))",
        "return 0.5 * a * (1.0 + tl.math.erf(a * 0.707106781))", "float64 --quick", quick=True),
    _op("gelu", "the slope of the density",
        "tl.math.exp(-0.5 * a * a)", "tl.math.exp(-0.5 * a * a + 1e-4)", "float64 --quick"),
    # Loss and optimizer.
    _op("flow_loss", "a form of huber that cancels",
        "loss = 2.0 * d * d / (root + c)", "loss = 2.0 * (root - c)", "float32"),
    _op("flow_loss", "the mask of another sample",
        "CELLS + b * CELL_COUNT + o % CELL_COUNT", "CELLS + o % CELL_COUNT", "bfloat16 --quick"),
    _op("adamw", "eps below the root",
        "(tl.sqrt(v_new) / root_bias2 + eps)", "(tl.sqrt(v_new + eps * eps) / root_bias2)",
        "float32"),
    _op("adamw", "clipping without its epsilon",
        "(tl.load(NORM).to(ACC) + NORM_EPS)", "tl.load(NORM).to(ACC)", "float64 --quick"),
    _op("adamw", "the second moment in 16 bit",
        "tl.where(live, v_new, v)", "tl.where(live, v_new.to(tl.bfloat16).to(ACC), v)", "float32"),
    # The block, adapters and the run.
    Plant("block: gates of the sublayer before", BLOCK,
          "m, after = self.modulations[sublayer : sublayer + 2]\n        return",
          "m, after = self.modulations[0], self.modulations[sublayer + 1]\n        return",
          "--op block --dtype float64 --quick"),
    Plant("block: the residual's gradient left out", BLOCK,
          "residual=dx, needs_modulation=needs", "residual=None, needs_modulation=needs",
          "--op block --dtype float64 --quick"),
    Plant("block: dgate of another sublayer", BLOCK,
          'gates.get(f"y{sublayer}")', 'gates.get(f"y{sublayer}") if sublayer else gates.get("y1")',
          "--op block --dtype float64 --quick"),
    Plant("block: adapters' gradients in 16 bit", BLOCK,
          "dtype=dtype,\n            **options,", "dtype=dy.dtype,\n            **options,",
          "pytest tests/test_block.py -k keep_their_precision"),
    Plant("adapters: gradients of a recomputed MLP", BLOCK,
          'dropped = ("a", "h.up")', 'dropped = ("a", "h.down")',
          "pytest tests/test_block.py -k test_agrees_with_eager"),
    Plant("run: every random draw is another", "anima_fast/data/seeding.py",
          'b":" + text for text in texts)', 'b";" + text for text in texts)', "--op loss"),
    Plant("run: the noise of a step depends on the step alone", "anima_fast/training/step.py",
          'seeded("step", run.seed, step, micro)', 'seeded("step", run.seed, step)', "--op loss"),
    Plant("run: sigma of another distribution", "anima_fast/models/flow.py",
          "return (1 - sigma) * latents + sigma * noise",
          "return (1 - sigma**1.01) * latents + sigma * noise", "--op loss"),
    # The precision that a run takes.
    Plant("precision: float32 sums on a GeForce", "anima_fast/measure/arithmetic.py",
          'return Arithmetic("fp16", short.chain, reason', 'return Arithmetic("fp16", 0, reason',
          "pytest tests/test_arithmetic.py -k test_the_table"),
    Plant("precision: short sums on an A100 by its name", "anima_fast/measure/arithmetic.py",
          "(geforce|titan)", "(geforce|titan|nvidia)",
          "pytest tests/test_arithmetic.py -k by_name"),
    Plant("precision: short sums without a measurement", "anima_fast/measure/sums.py",
          "ratio >= LEAST_RATIO", "ratio >= 0", "pytest tests/test_arithmetic.py -k rival"),
    Plant("precision: float32 sums timed as short ones", "anima_fast/measure/sums.py",
          "gemm(x, w, chain=chain)", "gemm(x, w)",
          "pytest tests/test_arithmetic.py -k what_is_timed"),
    Plant("precision: a run does not sum as it was decided", "anima_fast/training/setup.py",
          "set_sums(arithmetic.chain)", "set_sums(0)",
          "pytest tests/test_arithmetic.py -k guarded"),
    Plant("precision: saturation does not count", "anima_fast/training/guard.py",
          "in narrow.saturated.items()", "in wide.saturated.items()",
          "pytest tests/test_arithmetic.py -k verdict"),
    # What costs time or memory and changes no value.
    _op("dispatch", "half the warps of a row", "min(16, block // 512)", "min(16, block // 1024)",
        f"bench run layernorm_modulate --quick --metric registers,occupancy {COUNTS}", quick=True),
    Plant("block: one more launch", BLOCK,
          "layernorm_modulate_forward(x, m.scale", "layernorm_modulate_forward(x.clone(), m.scale",
          f"bench run block --quick --metric launches {COUNTS}", quick=True),
    Plant("block: a tensor kept for nothing", BLOCK,
          "(*KEPT, *SUBLAYERS) if needs_gates else KEPT", "(*KEPT, *SUBLAYERS)",
          f"bench run block --quick --metric kept,peak {COUNTS}"),
    Plant("program: a heavy module at start", "anima_fast/cli.py",
          "import sys\n\nfrom", "import sys\n\nimport numpy  # noqa: F401\n\nfrom",
          f"bench run program --quick --metric modules {COUNTS}", quick=True),
)  # fmt: skip
