"""The image phase: every image of the run as a latent cache file.

Images whose file is missing or unusable are grouped by bucket and encoded in batches; threads
decode the next images in the meantime.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anima_fast.data import cache, images, legacy_cache
from anima_fast.data.buckets import Size
from anima_fast.data.cache import CacheError, LatentEntry, Stored
from anima_fast.data.cache_folders import file_hashes, latent_name, printable
from anima_fast.data.encode_phase import EncodeJob, EncodePhase
from anima_fast.data.items import ImageItem
from anima_fast.data.layouts import some
from anima_fast.errors import UserError
from anima_fast.models.model_files import given

# That many failures mean that the VAE is at fault, not the images.
_MAX_FAILURES = 8

# Pixels [3, H, W] fp32 in [-1, 1] and alpha [H, W] fp32 0..1, as `images.load_item` returns them.
Decoded = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class LatentJob(EncodeJob):
    """One cache file and the image that it holds."""

    item: ImageItem


@dataclass
class LatentPhase(EncodePhase[LatentJob, LatentEntry]):
    """Encodes images; latents are kept in fp32. `legacy`: files of sd-scripts are looked for."""

    legacy: bool = True

    unit = "images"
    read = staticmethod(cache.read_latents)

    @property
    def threads(self) -> int:
        """Threads that read images."""
        return max(1, min(self.options.max_data_loader_n_workers, os.cpu_count() or 1))

    def run(self, items: Sequence[ImageItem]) -> list[Stored[LatentEntry]]:
        """The entry of each item, encoding what is missing; errors as `encode`."""
        stored = self._legacy(items) if self.legacy else {}
        places = [i for i in range(len(items)) if i not in stored]
        jobs = self._jobs([items[i] for i in places])
        files = self._files(jobs)
        stored |= {i: files[job.path] for i, job in zip(places, jobs, strict=True)}
        return [stored[i] for i in range(len(items))]

    def _legacy(self, items: Sequence[ImageItem]) -> dict[int, Stored[LatentEntry]]:
        """What sd-scripts has encoded, by place in `items`."""
        found: dict[int, Stored[LatentEntry]] = {}
        unusable, newer = [], []
        for i, item in enumerate(items):
            path = legacy_cache.latents_path(item)
            # sd-scripts never turns an image.
            if item.is_turned or not path.is_file():
                continue
            read = partial(legacy_cache.read_latents, item=item)
            try:
                is_read = self.keep or not self.options.skip_cache_check
                entry = read(path) if is_read else None
            except CacheError as error:
                unusable.append(f"{path.name}: {error}")
                continue
            found[i] = Stored(path, read, entry if self.keep else None)
            if item.path.stat().st_mtime > path.stat().st_mtime:
                newer.append(item.path.name)
        if found:
            changed = f", {len(newer)} images are newer ({some(newer)})" if newer else ""
            self.say(
                f"{len(found)} latents are used from *_anima.npz files, which do not show whether "
                f"image or VAE have changed{changed}: delete those that should be encoded again"
            )
        if unusable:
            self.say(f"{len(unusable)} latent files are encoded again ({some(unusable)})")
        return found

    def _jobs(self, items: list[ImageItem]) -> list[LatentJob]:
        if not items:
            return []
        hashes = file_hashes(self.folders, [item.path for item in items], self.threads)
        vae, dtype = cache.model_identity(given(self.options.vae, "vae")), self.models.dtype
        jobs = []
        for item in items:
            key = cache.latent_key(item, image_sha256=hashes[item.path], vae=vae, dtype=dtype)
            name = latent_name(item.path.stem, key)
            path = self.folders.find(name, item.path) or self.folders.place(name, item.path)
            jobs.append(LatentJob(key, path, item))
        return jobs

    def _files(self, jobs: list[LatentJob]) -> dict[Path, Stored[LatentEntry]]:
        """The entry of each job by its path; what is missing or unusable is encoded."""
        stored: dict[Path, Stored[LatentEntry]] = {}
        missing: dict[Path, LatentJob] = {}
        for path, job in {job.path: job for job in jobs}.items():
            if not path.is_file():
                missing[path] = job
            elif entry := self.open(path, partial(cache.check_latents, path, job.key, job.item)):
                stored[path] = entry
            else:
                # What is found in a folder that cannot be written is replaced elsewhere.
                missing[path] = replace(job, path=self.folders.place(path.name, job.item.path))
        encoded = self.encode(list(missing.values())) if missing else {}
        return stored | {path: encoded[job.path] for path, job in missing.items()}

    def entries(self, jobs: list[LatentJob]) -> Iterator[tuple[LatentJob, LatentEntry]]:
        """Encode in batches of one bucket; `UserError` for latents that are not finite."""
        failed: list[str] = []
        batches = batches_by_bucket(jobs, self.options.vae_batch_size)
        for batch, decoded in decode_ahead(batches, self.threads):
            for job, entry in zip(batch, self._encode_batch(batch, decoded), strict=True):
                if entry is None:
                    failed.append(str(job.item.path))
                else:
                    yield job, entry
            if len(failed) >= _MAX_FAILURES:
                break
        if failed:
            raise UserError(
                "the VAE made latents that are not finite (stage: image encoding) of "
                f"{some(failed)}: remove these images, or get another VAE file if it is all of them"
            )

    def origin(self, job: LatentJob) -> dict[str, str]:
        """The VAE and the image, with its sizes."""
        return {
            "vae": Path(given(self.options.vae, "vae")).name,
            "dtype": str(self.models.dtype),
            "image": printable(job.item.path.name),
            "image_size": "x".join(map(str, job.item.size)),
            "bucket": "x".join(map(str, job.item.bucket)),
        }

    def _encode_batch(
        self, jobs: list[LatentJob], decoded: list[Decoded]
    ) -> Iterator[LatentEntry | None]:
        """The entries of one batch; None for an image whose latents are not finite."""
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in decoded]))  # [B, 3, H, W]
        plain = self._latents(pixels)
        mirrored: dict[int, Tensor] = {}
        chosen = [i for i, job in enumerate(jobs) if job.item.subset.flip_aug]
        if chosen:
            latents = self._latents(pixels[chosen].flip(-1))
            mirrored = dict(zip(chosen, latents, strict=True))
        for i, (_, alpha) in enumerate(decoded):
            parts = [plain[i], mirrored[i]] if i in mirrored else [plain[i]]
            if all(bool(torch.isfinite(part).all()) for part in parts):
                yield LatentEntry(plain[i], mirrored.get(i), _alpha_to_bytes(alpha))
            else:
                yield None

    def _latents(self, pixels: Tensor) -> list[Tensor]:
        """Latents of each image, fp32 on the CPU; half precision that overflows is done again."""
        latents = list(self._run(pixels, self.models.dtype))
        if self.models.dtype != torch.float32:
            for i, latent in enumerate(latents):
                if not torch.isfinite(latent).all():
                    latents[i] = self._run(pixels[i : i + 1], torch.float32)[0]
        return latents

    @torch.no_grad()
    def _run(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        vae, device = self.models.vae(dtype), self.models.device
        rows = self.options.vae_chunk_size
        try:
            latents = vae.encode(pixels.to(device, dtype), chunk_rows=rows).float().cpu()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory while encoding {len(pixels)} images of "
                f"{pixels.shape[-1]}x{pixels.shape[-2]}: use --vae_batch_size 1 and a smaller "
                "--vae_chunk_size, such as 64"
            ) from error
        if not self.options.highvram and device.type == "cuda":
            torch.cuda.empty_cache()
        return latents


def batches_by_bucket(jobs: Sequence[LatentJob], size: int) -> list[list[LatentJob]]:
    """Jobs in batches of one bucket each, large buckets first: a lack of memory shows early."""
    buckets: dict[Size, list[LatentJob]] = defaultdict(list)
    for job in jobs:
        buckets[job.item.bucket].append(job)
    batches = []
    for bucket in sorted(buckets, key=lambda wh: (-wh[0] * wh[1], wh)):
        same = buckets[bucket]
        batches += [same[i : i + size] for i in range(0, len(same), size)]
    return batches


def decode_ahead(
    batches: Sequence[list[LatentJob]], threads: int
) -> Iterator[tuple[list[LatentJob], list[Decoded]]]:
    """Each batch with its decoded images; threads keep about `threads` images ahead."""
    waiting: deque[tuple[list[LatentJob], list[Future[Decoded]]]] = deque()
    upcoming = iter(batches)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        while True:
            # The batch handed out next does not count as ahead.
            while sum(len(jobs) for jobs, _ in list(waiting)[1:]) < threads:
                jobs = next(upcoming, None)
                if jobs is None:
                    break
                waiting.append((jobs, [pool.submit(images.load_item, job.item) for job in jobs]))
            if not waiting:
                return
            jobs, futures = waiting.popleft()
            yield jobs, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _alpha_to_bytes(alpha: np.ndarray | None) -> Tensor | None:
    """[H, W] 0..1, which came from bytes, as uint8 again."""
    if alpha is None:
        return None
    return torch.from_numpy(np.rint(alpha * 255).astype(np.uint8))
