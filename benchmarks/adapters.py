"""LoRA, LoHa, LoKr and DoRA on one layer against lycoris-lora: time and bytes kept for backward.

    python benchmarks/adapters.py --size 2048 8192 --tokens 1024 --rank 16 --out adapters.json

Forward and backward of a frozen linear layer with one adapter, the same values on both sides.
Ours runs in float32 as the package does; the ratio is the median of the ratios within a repeat,
which a busy machine disturbs least. Kept bytes are those of the tensors that autograd saves, the
layer's own weight left out. On a CUDA card when there is one. Needs lycoris-lora.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from anima_fast.adapters.deltas import Delta
from anima_fast.adapters.layers import Dropouts
from anima_fast.adapters.lora import LAYERS
from anima_fast.adapters.lycoris import initial_magnitudes
from anima_fast.adapters.targets import Target
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


def kept_mib(module: nn.Module, x: Tensor, weight: Tensor) -> float:
    """MiB of the tensors that autograd keeps, without the layer's weight and the input."""
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
    return sum(sizes.values()) / 2**20


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, the device's work included."""
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, arguments: argparse.Namespace) -> dict:
    """Ratio of times and kept bytes of one kind."""
    inputs, outputs = arguments.size
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=False, device=DEVICE).requires_grad_(False)
    delta = make_delta(name, plain, arguments.rank)
    x = torch.randn(arguments.tokens, inputs, device=DEVICE)
    dy = torch.randn(arguments.tokens, outputs, device=DEVICE)
    twin = nn.Linear(inputs, outputs, bias=False, device=DEVICE).requires_grad_(False)
    twin.weight.copy_(plain.weight)
    modules = {"lycoris": theirs(delta, twin), "ours": ours(delta, plain)}
    results = {provider: step(module, x, dy) for provider, module in modules.items()}
    error = (results["ours"] - results["lycoris"]).abs().max() / results["lycoris"].abs().max()
    if error > 1e-4:
        raise SystemExit(f"{name}: ours differs from lycoris by {error:.1e}, nothing is timed")
    seconds: dict[str, list[float]] = {provider: [] for provider in modules}
    for _ in range(arguments.repeats):
        for provider, module in modules.items():
            seconds[provider].append(timed(lambda m=module: step(m, x, dy)))
    ratios = [a / b for a, b in zip(seconds["lycoris"], seconds["ours"], strict=True)]
    return {
        "kind": name,
        "ours_ms": 1e3 * statistics.median(seconds["ours"]),
        "lycoris_ms": 1e3 * statistics.median(seconds["lycoris"]),
        "speedup": statistics.median(ratios),
        "ours_kept_mib": kept_mib(modules["ours"], x, plain.weight),
        "lycoris_kept_mib": kept_mib(modules["lycoris"], x, twin.weight),
        "difference": error.item(),
    }


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 2048), help="inputs outputs")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the input")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each provider")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(name, arguments) for name in KINDS]
    print(f"{arguments.size[0]} -> {arguments.size[1]}, {arguments.tokens} rows, float32, {DEVICE}")
    print(f"{'':14}{'ours ms':>10}{'lycoris':>10}{'speed-up':>10}{'kept MiB':>10}{'lycoris':>10}")
    for row in rows:
        print(
            f"{row['kind']:14}{row['ours_ms']:>10.1f}{row['lycoris_ms']:>10.1f}"
            f"{row['speedup']:>9.2f}x{row['ours_kept_mib']:>10.2f}{row['lycoris_kept_mib']:>10.2f}"
        )
    if arguments.out:
        from anima_fast.files import write_json

        setting = {n: getattr(arguments, n) for n in ("size", "tokens", "rank", "threads")}
        versions = {n: importlib.metadata.version(n) for n in ("torch", "lycoris-lora")}
        machine = {"device": DEVICE, "python": platform.python_version(), **versions}
        date = datetime.date.today().isoformat()
        write_json(arguments.out, {**setting, **machine, "date": date, "results": rows})


if __name__ == "__main__":
    main()
