"""LoRA, LoHa, LoKr and DoRA on one layer against lycoris-lora: time and bytes kept for backward.

    python benchmarks/adapters.py --size 2048 8192 --tokens 1024 --rank 16 --out adapters.jsonl

Forward and backward of a frozen linear layer with one adapter, the same values on both sides.
Ours runs in float32 as the package does; the ratio is the median of the ratios within a repeat,
which a busy machine disturbs least. Kept bytes are those of the tensors that autograd saves, the
layer's own weight left out. On a CUDA card when there is one. Needs lycoris-lora.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from anima_fast.adapters.deltas import Delta
from anima_fast.adapters.layers import Dropouts
from anima_fast.adapters.lora import LAYERS
from anima_fast.adapters.lycoris import initial_magnitudes
from anima_fast.adapters.targets import Target
from anima_fast.bench.environment import environment, version
from anima_fast.bench.run_file import Measurement, ratio, sampled, write_run
from anima_fast.bench.tables import table
from anima_fast.measure.timer import Timer
from anima_fast.models.adapter_kinds import LOHA, LOKR, LORA

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "lora": (LORA, {}, False),
    "loha": (LOHA, {}, False),
    "lokr": (LOKR, {}, False),
    "lokr factor 8": (LOKR, {"factor": 8}, False),
    "dora": (LORA, {}, True),
}


def make_delta(name: str, linear: nn.Linear, rank: int) -> Delta:
    """An adapter with random values, alpha = rank."""
    kind, options, dora = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    shape = (linear.out_features, linear.in_features)
    delta = LAYERS[kind].initial(shape, rank, generator, **options)
    delta = replace(delta, alpha=torch.tensor(float(rank)))
    delta = delta.map(lambda t: 0.02 * torch.randn(t.shape, generator=generator))
    if dora:
        delta = replace(delta, dora_scale=initial_magnitudes(linear))
    return delta


def ours(delta: Delta, linear: nn.Linear) -> nn.Module:
    """The layer with our adapter."""
    adapter = LAYERS[delta.kind](Target("dit", "layer", linear), delta, Dropouts()).to(DEVICE)
    adapter.attach()
    return adapter


def theirs(delta: Delta, linear: nn.Linear) -> nn.Module:
    """The package's module with the same tensors."""
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    judge = {LORA: LoConModule, LOHA: LohaModule, LOKR: LokrModule}[delta.kind]
    renamed = {"down": "lora_down.weight", "up": "lora_up.weight"}
    tensors = {renamed.get(name, name): t for name, t in delta.tensors().items()}
    with torch.no_grad():
        given = [tensors.get(name) for name in judge.weight_list]
        return judge.make_module_from_state_dict("layer", linear, *given).to(DEVICE)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """One forward and backward; returns y."""
    x = x.detach().requires_grad_(True)
    y = module(x)
    y.backward(dy)
    return y.detach()


def kept_bytes(module: nn.Module, x: Tensor, weight: Tensor) -> int:
    """Bytes of the tensors that autograd keeps, without the layer's weight and the input."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t

    x = x.detach().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    for tensor in (x, weight, *module.parameters()):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return sum(sizes.values())


def measure(name: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Times, kept bytes and the difference of one kind."""
    inputs, outputs = arguments.size
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False, device=DEVICE).requires_grad_(False)
    delta = make_delta(name, linear, arguments.rank)
    x = torch.randn(arguments.tokens, inputs, device=DEVICE)
    dy = torch.randn(arguments.tokens, outputs, device=DEVICE)
    twin = nn.Linear(inputs, outputs, bias=False, device=DEVICE).requires_grad_(False)
    twin.weight.copy_(linear.weight)
    modules = {"lycoris": theirs(delta, twin), "own": ours(delta, linear)}
    results = {provider: step(module, x, dy) for provider, module in modules.items()}
    largest = results["lycoris"].abs().max()
    error = ((results["own"] - results["lycoris"]).abs().max() / largest).item()
    if error > 1e-4:
        raise SystemExit(f"{name}: ours differs from lycoris by {error:.1e}, nothing is timed")
    timer = Timer({provider: partial(step, m, x, dy) for provider, m in modules.items()})
    for _ in range(arguments.repeats):
        timer.round()
    case = f"M={arguments.tokens} K={inputs} N={outputs} R={arguments.rank}"
    plain = Measurement(name, "time", None, "s", f"{case} threads={arguments.threads}", "float32",
                        mode="both", source="card" if DEVICE == "cuda" else "host")  # fmt: skip
    rows = []
    for provider, weight in (("own", linear.weight), ("lycoris", twin.weight)):
        row = replace(plain, provider=provider)
        kept = kept_bytes(modules[provider], x, weight)
        rows += [sampled(row, timer.seconds[provider]),
                 replace(row, metric="kept", unit="bytes", value=kept)]  # fmt: skip
    return [*rows, replace(plain, metric="error", unit="largest", value=error)]


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 2048), help="inputs outputs")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the input")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each provider")
    parser.add_argument("--out", type=Path, help="write the figures to this run file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, lines = [], []
    for name in KINDS:
        found = measure(name, arguments)
        own, own_kept, theirs, theirs_kept, _ = found
        kept = (f"{row.known / 2**20:.2f}" for row in (own_kept, theirs_kept))
        times = (f"{1e3 * row.known:.1f}" for row in (own, theirs))
        lines.append((name, *times, f"{ratio(own, theirs):.2f}x", *kept))
        rows += found
    print(f"{arguments.size[0]} -> {arguments.size[1]}, {arguments.tokens} rows, float32, {DEVICE}")
    print(table(("", "own ms", "lycoris", "speed-up", "kept MiB", "lycoris"), lines))
    if arguments.out:
        write_run(arguments.out, environment() | {"lycoris": version("lycoris-lora")}, rows)


if __name__ == "__main__":
    main()
