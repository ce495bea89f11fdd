"""The latent phase: every image of the run as a latent cache file.

Images whose file is missing or unusable are grouped by bucket and encoded in batches; threads
decode the next images in the meantime. Each image is written as soon as its batch is done, so an
interrupted run continues where it stopped. The VAE is loaded only when something is missing, and
freed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from anima_fast.data import cache, images, legacy_cache
from anima_fast.data.cache import CacheError, LatentEntry, LatentSpec, Stored
from anima_fast.data.cache_folders import CacheFolders, FileHashes, latent_name, printable
from anima_fast.data.encode_models import Decoded, LatentEncoder
from anima_fast.data.items import ImageItem
from anima_fast.data.layouts import some
from anima_fast.errors import UserError
from anima_fast.models.model_files import given
from anima_fast.options.data import CacheOptions, ModelOptions
from anima_fast.progress import ItemProgress

# That many failures mean that the VAE is at fault, not the images.
_MAX_FAILURES = 8


@dataclass(frozen=True)
class LatentJob:
    """One cache file: its image, its contents, its path."""

    item: ImageItem
    spec: LatentSpec
    path: Path


@dataclass
class LatentPhase:
    """Turns items into cache entries. `dtype` is the VAE's; latents are always kept in fp32.

    `threads` read images; `legacy`: whether files of sd-scripts are looked for.
    """

    models: ModelOptions
    caches: CacheOptions
    folders: CacheFolders
    device: torch.device
    dtype: torch.dtype
    say: Callable[[str], None]
    threads: int = 1
    legacy: bool = True

    def run(self, items: Sequence[ImageItem]) -> list[Stored[LatentEntry]]:
        """The entry of each item, encoding what is missing.

        Raises `UserError` for an unreadable image, a latent that is not finite, a full disk.
        """
        legacy = self._legacy(items) if self.legacy else {}
        jobs = self._jobs([item for i, item in enumerate(items) if i not in legacy])
        stored, missing = self._look_up(jobs)
        if missing:
            stored |= self._encode(missing)
        found = iter(jobs)
        return [legacy[i] if i in legacy else stored[next(found).path] for i in range(len(items))]

    @property
    def keep(self) -> bool:
        """Latents stay in memory, instead of being read for every batch."""
        return not self.caches.cache_latents_to_disk

    def _legacy(self, items: Sequence[ImageItem]) -> dict[int, Stored[LatentEntry]]:
        found: dict[int, Stored[LatentEntry]] = {}
        unusable, newer = [], []
        for i, item in enumerate(items):
            path = legacy_cache.latents_path(item)
            # sd-scripts never turns an image.
            if item.is_turned or not path.is_file():
                continue
            entry = None
            if self.keep or not self.caches.skip_cache_check:
                try:
                    entry = legacy_cache.read_latents(path, item)
                except CacheError as error:
                    unusable.append(f"{path.name}: {error}")
                    continue
            found[i] = Stored(
                path,
                partial(legacy_cache.read_latents, item=item),
                entry if self.keep else None,
            )
            if item.path.stat().st_mtime > path.stat().st_mtime:
                newer.append(item.path.name)
        self._say_legacy(len(found), newer, unusable)
        return found

    def _say_legacy(self, count: int, newer: list[str], unusable: list[str]) -> None:
        if count:
            changed = f", {len(newer)} images are newer ({some(newer)})" if newer else ""
            self.say(
                f"{count} latents are used from *_anima.npz files, which do not show whether image "
                f"or VAE have changed{changed}: delete those that should be encoded again"
            )
        if unusable:
            self.say(f"{len(unusable)} latent files are encoded again ({some(unusable)})")

    def _jobs(self, items: list[ImageItem]) -> list[LatentJob]:
        if not items:
            return []
        hashes = FileHashes(self.folders).many([item.path for item in items], self.threads)
        vae = cache.model_identity(given(self.models.vae, "vae"))
        jobs = []
        for item in items:
            spec = cache.latent_spec(
                item, image_sha256=hashes[item.path], vae=vae, dtype=self.dtype
            )
            name = latent_name(item.path.stem, spec.key)
            path = self.folders.find(name, item.path) or self.folders.place(name, item.path)
            jobs.append(LatentJob(item, spec, path))
        return jobs

    def _look_up(
        self, jobs: list[LatentJob]
    ) -> tuple[dict[Path, Stored[LatentEntry]], list[LatentJob]]:
        """Entries of the files that can be used, and the jobs without one."""
        stored: dict[Path, Stored[LatentEntry]] = {}
        missing: dict[Path, LatentJob] = {}
        for job in jobs:
            if job.path in stored or job.path in missing:
                continue
            if not job.path.is_file():
                missing[job.path] = job
                continue
            try:
                if not self.caches.skip_cache_check:
                    cache.check_latents(job.path, job.spec)
                value = cache.read_latents(job.path) if self.keep else None
                stored[job.path] = Stored(job.path, cache.read_latents, value)
            except CacheError as error:
                self.say(f"cache file {job.path} cannot be used ({error}): encoded again")
                # What is found in a folder that cannot be written is replaced elsewhere.
                path = self.folders.place(job.path.name, job.item.path)
                missing[job.path] = replace(job, path=path)
        return stored, list(missing.values())

    def _encode(self, missing: list[LatentJob]) -> dict[Path, Stored[LatentEntry]]:
        encoder = LatentEncoder(
            self.models, self.device, self.dtype, keep_cached=self.caches.highvram
        )
        stored: dict[Path, Stored[LatentEntry]] = {}
        failed: list[str] = []
        batches = batches_by_bucket(missing, self.caches.vae_batch_size)
        origin = {"vae": Path(given(self.models.vae, "vae")).name, "dtype": str(self.dtype)}
        with ItemProgress("encoding images", len(missing), "images", self.say) as progress:
            try:
                for jobs, decoded in decode_ahead(batches, self.threads):
                    entries = encoder.encode(decoded, [job.spec.flip for job in jobs])
                    for job, entry in zip(jobs, entries, strict=True):
                        if entry is None:
                            failed.append(str(job.item.path))
                            continue
                        cache.write_latents(job.path, entry, job.spec, origin | _origin(job))
                        value = entry if self.keep else None
                        stored[job.path] = Stored(job.path, cache.read_latents, value)
                        progress.advance(1)
                    if len(failed) >= _MAX_FAILURES:
                        break
            finally:
                encoder.free()
        if failed:
            raise UserError(
                "the VAE made latents that are not finite (stage: image encoding) of "
                f"{some(failed)}: remove these images, or get another VAE file if it is all of them"
            )
        return stored


def batches_by_bucket(jobs: Sequence[LatentJob], size: int) -> list[list[LatentJob]]:
    """Jobs in batches of one bucket each, large buckets first: a lack of memory shows early."""
    buckets: dict[tuple[int, int], list[LatentJob]] = {}
    for job in jobs:
        buckets.setdefault(job.spec.size, []).append(job)
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


def _origin(job: LatentJob) -> dict[str, str]:
    item = job.item
    return {
        "image": printable(item.path.name),
        "image_size": "x".join(map(str, item.size)),
        "bucket": "x".join(map(str, item.bucket)),
    }
