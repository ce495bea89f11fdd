"""VAE encoding against diffusers: time and peak memory on the same random weights and image.

    python benchmarks/vae_encode.py --size 512 --width 96 --threads 1 --out vae.jsonl

Time: one process, every provider warmed with one encode, then interleaved repeats; the ratio is the
median of the ratios within a repeat, which a busy machine disturbs least. Memory: a fresh process
per provider, which loads the weights, runs a small image, and then reports how far the high-water
mark of resident memory rises above that point during one encode (Linux only). Encoding is the
posterior mean in float32 on the CPU. Needs diffusers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from anima_fast.bench.environment import environment, version
from anima_fast.bench.run_file import Measurement, sampled, write_run
from anima_fast.bench.tables import table

REFERENCE = "diffusers"
PROVIDERS = (REFERENCE, "anima_fast", "anima_fast chunk_rows=64")
SMALL = 64


def load(provider: str, weights: Path, width: int) -> Callable[[Tensor], Tensor]:
    """The encode function of a provider with the given weights file."""
    if provider == REFERENCE:
        from diffusers import AutoencoderKLQwenImage
        from safetensors.torch import load_file

        model = AutoencoderKLQwenImage(base_dim=width)
        model.load_state_dict(load_file(weights), assign=True)
        model.eval()
        mean = torch.tensor(model.config.latents_mean)[:, None, None]
        std = torch.tensor(model.config.latents_std)[:, None, None]
        return lambda x: (model.encode(x[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    from anima_fast.models.vae_checkpoint import load_vae

    vae = load_vae(weights)
    rows = 64 if provider.endswith("chunk_rows=64") else None
    return lambda x: vae.encode(x, chunk_rows=rows)


def make_weights(path: Path, width: int) -> None:
    """Random weights of the real architecture, under diffusers' names."""
    from diffusers import AutoencoderKLQwenImage
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(AutoencoderKLQwenImage(base_dim=width).state_dict(), path)


def make_image(size: int) -> Tensor:
    """One image [1, 3, size, size] in [-1, 1]."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def measure_times(weights: Path, width: int, size: int, repeats: int) -> dict[str, dict]:
    """Seconds of each encode and the largest difference from the reference, per provider."""
    encoders = {provider: load(provider, weights, width) for provider in PROVIDERS}
    image = make_image(size)
    results = {provider: encode(image) for provider, encode in encoders.items()}
    seconds = {provider: [] for provider in PROVIDERS}
    for _ in range(repeats):
        for provider, encode in encoders.items():
            start = time.perf_counter()
            encode(image)
            seconds[provider].append(time.perf_counter() - start)
    return {
        provider: {
            "samples": times,
            "difference": (results[provider] - results[REFERENCE]).abs().max().item(),
        }
        for provider, times in seconds.items()
    }


@torch.inference_mode()
def worker(provider: str, weights: Path, width: int, size: int) -> None:
    """Print the mebibytes that one encode adds to this process (its own, fresh process)."""
    encode = load(provider, weights, width)
    image = make_image(size)
    encode(make_image(SMALL))
    base = memory_mib("VmRSS")
    # Writing 5 sets the high-water mark back to the present size.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    encode(image)
    print(json.dumps({"base_mib": base, "peak_mib": memory_mib("VmHWM") - base}))


def memory_mib(field: str) -> float:
    """A size from /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure_memory(weights: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Peak memory per provider, each in a process of its own; empty off Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    found = {}
    for provider in PROVIDERS:
        command = [sys.executable, __file__, "--worker", provider, "--weights", str(weights)]
        for name in ("size", "width", "threads"):
            command += [f"--{name}", str(getattr(arguments, name))]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[provider] = json.loads(output.strip().splitlines()[-1])
    return found


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="side of the square image (pixels)")
    parser.add_argument("--width", type=int, default=96, help="base width of the VAE (channels)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3, help="timed encodes per provider")
    parser.add_argument("--out", type=Path, help="write the figures to this run file")
    parser.add_argument("--worker", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        return worker(arguments.worker, arguments.weights, arguments.width, arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "vae.safetensors"
        make_weights(weights, arguments.width)
        memory = measure_memory(weights, arguments)
        times = measure_times(weights, arguments.width, arguments.size, arguments.repeats)
    report(arguments, times, memory)


def report(arguments: argparse.Namespace, times: dict[str, dict], memory: dict[str, dict]) -> None:
    """Print one row per provider and write the run file if one is asked for."""
    size = f"{arguments.size}x{arguments.size} width={arguments.width} threads={arguments.threads}"
    print(f"{size}, float32, CPU")
    rows = []
    for provider, found in times.items():
        plain = Measurement("vae_encode", "time", None, "s", size, "float32", provider, "fwd")
        rows.append(sampled(plain, found["samples"]))
        rows.append(replace(plain, metric="error", unit="largest", value=found["difference"]))
        if provider in memory:
            peak = memory[provider]["peak_mib"] * 2**20
            rows.append(replace(plain, metric="peak", unit="bytes", value=peak))
    values = {(row.provider, row.metric): row for row in rows}
    lines = []
    for provider in times:
        time, peak = (values.get((provider, metric)) for metric in ("time", "peak"))
        reference = values[REFERENCE, "time"]
        speed = statistics.median(
            r / t for r, t in zip(reference.samples, time.samples, strict=True)
        )
        share = peak.value / values[REFERENCE, "peak"].value if peak else None
        lines.append((
            provider, f"{time.value:.2f}", f"{speed:.2f}x",
            f"{peak.value / 2**20:.0f}" if peak else "-", f"{share:.2f}" if peak else "-",
            f"{values[provider, 'error'].value:.1e}",
        ))  # fmt: skip
    print(table(("provider", "seconds", "speed-up", "peak MiB", "of ref.", "diff"), lines))
    if arguments.out:
        write_run(arguments.out, environment() | {"diffusers": version("diffusers")}, rows)


if __name__ == "__main__":
    main()
