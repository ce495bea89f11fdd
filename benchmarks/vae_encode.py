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
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from anima_fast.bench.environment import environment, version
from anima_fast.bench.run_file import Measurement, ratio, sampled, write_run
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
def time_rows(plain: Measurement, weights: Path, arguments: Namespace) -> list[Measurement]:
    """Seconds of each encode, and the largest difference from the reference's latents."""
    encoders = {provider: load(provider, weights, arguments.width) for provider in PROVIDERS}
    image = make_image(arguments.size)
    results = {provider: encode(image) for provider, encode in encoders.items()}
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    for _ in range(arguments.repeats):
        for provider, encode in encoders.items():
            start = time.perf_counter()
            encode(image)
            seconds[provider].append(time.perf_counter() - start)
    rows = [sampled(replace(plain, provider=p), found) for p, found in seconds.items()]
    return rows + [
        replace(plain, metric="error", unit="largest", provider=provider,
                value=(results[provider] - results[REFERENCE]).abs().max().item())
        for provider in PROVIDERS[1:]
    ]  # fmt: skip


@torch.inference_mode()
def worker(provider: str, weights: Path, width: int, size: int) -> None:
    """Print the bytes that one encode adds to this process (its own, fresh process)."""
    encode = load(provider, weights, width)
    image = make_image(size)
    encode(make_image(SMALL))
    base = process_bytes("VmRSS")
    # Writing 5 sets the high-water mark back to the present size.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    encode(image)
    print(process_bytes("VmHWM") - base)


def process_bytes(field: str) -> int:
    """A size from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def memory_rows(plain: Measurement, weights: Path, arguments: Namespace) -> list[Measurement]:
    """Peak memory per provider, each in a process of its own; none off Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return []
    rows = []
    for provider in PROVIDERS:
        command = [sys.executable, __file__, "--worker", provider, "--weights", str(weights)]
        for name in ("size", "width", "threads"):
            command += [f"--{name}", str(getattr(arguments, name))]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(replace(plain, metric="resident", unit="bytes", provider=provider,
                            value=int(output.split()[-1])))  # fmt: skip
    return rows


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
    case = f"size={arguments.size} width={arguments.width} threads={arguments.threads}"
    plain = Measurement("vae_encode", "time", None, "s", case, "float32", mode="fwd")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "vae.safetensors"
        make_weights(weights, arguments.width)
        rows = memory_rows(plain, weights, arguments) + time_rows(plain, weights, arguments)
    print(f"{case}, float32, CPU")
    print(text_of(rows))
    if arguments.out:
        write_run(arguments.out, environment() | {"diffusers": version("diffusers")}, rows)


def text_of(rows: list[Measurement]) -> str:
    """One line per provider."""
    found = {(row.provider, row.metric): row for row in rows}
    lines = []
    for provider in PROVIDERS:
        taken = found[provider, "time"]
        resident, error = (found.get((provider, metric)) for metric in ("resident", "error"))
        lines.append((
            provider, f"{taken.value:.2f}", f"{ratio(taken, found[REFERENCE, 'time']):.2f}x",
            f"{resident.known / 2**20:.0f}" if resident else "-",
            f"{error.value:.1e}" if error else "-",
        ))  # fmt: skip
    return table(("provider", "seconds", "speed-up", "peak MiB", "diff"), lines)


if __name__ == "__main__":
    main()
