"""The text phase: every caption of the run, and the empty one, as a text cache file.

A caption whose parts are random is cached in several renderings (`caption_variants`). The form is
"context", the LLM adapter's output, or "states" when the adapter is trained: Qwen3 states and T5
ids, from which it computes the context in every step. Encoder and adapter are loaded only when
something is missing, and freed.

A caption within 512 tokens is encoded the same way whatever `long_captions` says and keeps its
file; the file of a longer one belongs to either form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from anima_fast.data import cache, legacy_cache
from anima_fast.data.cache import CacheError, Stored, TextEntry
from anima_fast.data.cache_folders import CacheFolders, FileHashes, text_name
from anima_fast.data.caption_tokens import CaptionTokens
from anima_fast.data.encode_models import TextModels, adapter_path, source_width
from anima_fast.data.items import ImageItem
from anima_fast.data.layouts import some
from anima_fast.errors import UserError
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.model_files import given
from anima_fast.models.tokenizers import TokenBatch, Tokenizers
from anima_fast.options.data import CacheOptions, ModelOptions
from anima_fast.progress import ItemProgress


@dataclass(frozen=True)
class TextJob:
    """One cache file: the caption, its key and path, and sd-scripts' encoding where it is used."""

    text: str
    key: str
    path: Path
    legacy: TextEntry | None = None


@dataclass
class TextPhase:
    """Turns captions into cache entries of one form, in `dtype`.

    `token_limits`: tokens of Qwen3 and T5 after which a caption is cut off.
    """

    models: ModelOptions
    caches: CacheOptions
    tokenizers: Tokenizers
    tokens: CaptionTokens
    token_limits: tuple[int, int]
    folders: CacheFolders
    device: torch.device
    dtype: torch.dtype
    form: str
    say: Callable[[str], None]
    _parts: dict[str, object] = field(init=False)
    _legacy_used: int = field(init=False, default=0)
    _stale: list[str] = field(init=False, default_factory=list)

    def run(
        self, items: Sequence[ImageItem], texts: Sequence[Sequence[str]]
    ) -> tuple[list[tuple[Stored[TextEntry], ...]], Stored[TextEntry]]:
        """The renderings `texts` of each item's caption as entries, and the entry of "".

        Raises `UserError` when a model is missing, an encoding is not finite, a file cannot be
        written.
        """
        self._parts = self._key_parts()
        # Each text once, with the image whose folder holds its file.
        owners: dict[str, ImageItem] = {"": items[0]}
        single: dict[str, list[Path]] = {}
        for item, variants in zip(items, texts, strict=True):
            for text in variants:
                owners.setdefault(text, item)
            if len(variants) == 1:
                single.setdefault(variants[0], []).append(item.path)
        stored, missing = self._look_up(owners, single)
        self._say_legacy()
        if missing:
            largest = max(item.dataset.batch_size for item in items)
            stored |= self._encode(missing, self.caches.text_encoder_batch_size or largest)
        return [tuple(stored[t] for t in variants) for variants in texts], stored[""]

    @property
    def keep(self) -> bool:
        """Encodings stay in memory, instead of being read for every batch."""
        return not self.caches.cache_text_encoder_outputs_to_disk

    def _key_parts(self) -> dict[str, object]:
        parts: dict[str, object] = {
            "kind": "text",
            "form": self.form,
            "tokenizers": self.tokenizers.identity,
            "encoder": cache.model_identity(given(self.models.qwen3, "qwen3")),
            "dtype": str(self.dtype),
        }
        if self.form == "context":
            parts["adapter"] = cache.model_identity(adapter_path(self.models))
        return parts

    def _key(self, text: str, **other: object) -> str:
        """Key of a text's file; `other` replaces parts."""
        lengths = self.tokens.lengths.get(text)
        short = self.tokens.whole and (lengths is None or lengths.longest <= TEXT_ROWS)
        limits = [TEXT_ROWS, TEXT_ROWS] if short else list(self.token_limits)
        return cache.digest({**self._parts, "lengths": limits, "text": text, **other})

    def _look_up(
        self, owners: dict[str, ImageItem], single: dict[str, list[Path]]
    ) -> tuple[dict[str, Stored[TextEntry]], list[TextJob]]:
        """Entries of the files that can be used, and jobs for the other texts."""
        stored, missing = {}, []
        keys = {text: self._key(text) for text in owners}
        for text, item in owners.items():
            if (entry := self._open(keys[text], item.path)) is not None:
                stored[text] = entry
        legacy = {
            text: [path for path in map(legacy_cache.text_path, images) if path.is_file()]
            for text, images in single.items()
            if text not in stored
        }
        hashes = FileHashes(self.folders).many([p for paths in legacy.values() for p in paths], 1)
        for text in [text for text in owners if text not in stored]:
            found = self._from_legacy(text, legacy.get(text, ()), hashes)
            if isinstance(found, Stored):
                stored[text] = found
                continue
            place = self.folders.place(text_name(keys[text]), owners[text].path)
            missing.append(found or TextJob(text, keys[text], place))
        return stored, missing

    def _open(self, key: str, image: Path) -> Stored[TextEntry] | None:
        path = self.folders.find(text_name(key), image, anywhere=True)
        if path is None:
            return None
        try:
            if not self.caches.skip_cache_check:
                cache.check_text(path, key, self.form)
            value = cache.read_text(path) if self.keep else None
            return Stored(path, cache.read_text, value)
        except CacheError as error:
            self.say(f"cache file {path} cannot be used ({error}): encoded again")
            return None

    def _from_legacy(
        self, text: str, paths: Sequence[Path], hashes: dict[Path, str]
    ) -> Stored[TextEntry] | TextJob | None:
        """What sd-scripts has encoded for this text: as an entry, as a job for the adapter."""
        for path in paths:
            key = self._key(text, encoder=f"sd-scripts:{hashes[path]}")
            entry = self._open(key, path)
            if entry is None:
                try:
                    legacy, count = legacy_cache.read_text(path)
                    self._compare(text, legacy, count)
                except CacheError as error:
                    self._stale.append(f"{path.name}: {error}")
                    continue
                place = self.folders.place(text_name(key), path)
                self._legacy_used += 1
                return TextJob(text, key, place, legacy)
            self._legacy_used += 1
            return entry
        return None

    def _compare(self, text: str, legacy: TextEntry, count: int) -> None:
        assert legacy.t5_ids is not None and legacy.source_states is not None
        tokens = self._tokens([text])
        same_ids = torch.equal(tokens.t5_ids[0][tokens.t5_mask[0].bool()], legacy.t5_ids)
        # T5 knows no Chinese or Japanese; the count of Qwen3 tokens shows more edits there.
        if not same_ids or int(tokens.qwen_mask.sum()) != count:
            is_cut = len(legacy.t5_ids) >= TEXT_ROWS and tokens.t5_ids.shape[1] > len(legacy.t5_ids)
            raise CacheError("cut off at 512 tokens" if is_cut else "made from another caption")
        if legacy.source_states.shape[1] != source_width(self.models):
            raise CacheError("made by another text encoder")

    def _say_legacy(self) -> None:
        if self._legacy_used:
            self.say(
                f"{self._legacy_used} text encodings are used from *_anima_te.npz files, which do "
                "not show whether the text encoder has changed"
            )
        if self._stale:
            self.say(f"{len(self._stale)} text files are encoded again ({some(self._stale)})")

    def _encode(self, missing: list[TextJob], size: int) -> dict[str, Stored[TextEntry]]:
        models = TextModels(self.models, self.device, self.dtype, keep_cached=self.caches.highvram)
        stored = {}
        with ItemProgress("encoding captions", len(missing), "captions", self.say) as progress:
            try:
                for jobs in self._batches(missing, size):
                    entries = self._encode_batch(jobs, models)
                    for job, entry in zip(jobs, entries, strict=True):
                        cache.write_text(job.path, entry, job.key, self._origin(job))
                        value = entry if self.keep else None
                        stored[job.text] = Stored(job.path, cache.read_text, value)
                        progress.advance(1)
            finally:
                models.free()
        return stored

    def _batches(self, jobs: list[TextJob], size: int) -> list[list[TextJob]]:
        """Batches of similar length, long ones first; texts from sd-scripts' files apart."""
        lengths = [self._qwen_length(job.text) for job in jobs]
        batches = []
        for is_legacy in (False, True):
            same = [
                (-length, job.text, job)
                for length, job in zip(lengths, jobs, strict=True)
                if (job.legacy is not None) == is_legacy
            ]
            order = [job for _, _, job in sorted(same, key=lambda entry: entry[:2])]
            batches += [order[i : i + size] for i in range(0, len(order), size)]
        return batches

    @torch.no_grad()
    def _encode_batch(self, jobs: list[TextJob], models: TextModels) -> list[TextEntry]:
        tokens = self._tokens([job.text for job in jobs])
        mask = tokens.qwen_mask.to(self.device)
        try:
            rows = [job.legacy.source_states for job in jobs if job.legacy is not None]
            if rows:
                states = pad_rows(rows, mask.shape[1]).to(self.device, self.dtype)
            else:
                states = models.encoder()(tokens.qwen_ids.to(self.device), mask)
            _require_finite(states, jobs, "Qwen3 text encoder")
            if self.form == "states":
                return self._state_entries(tokens, states)
            t5_ids, t5_mask = tokens.t5_ids.to(self.device), tokens.t5_mask.to(self.device)
            context = models.adapter()(t5_ids, t5_mask, states.to(self.dtype), mask)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory while encoding {len(jobs)} captions: use "
                "--text_encoder_batch_size 1"
            ) from error
        _require_finite(context, jobs, "LLM adapter")
        counts = tokens.t5_mask.sum(1).tolist()
        return [
            TextEntry(context=rows[:count].to("cpu", self.dtype).clone())
            for rows, count in zip(context, counts, strict=True)
        ]

    def _state_entries(self, tokens: TokenBatch, states: Tensor) -> list[TextEntry]:
        counts = zip(tokens.qwen_mask.sum(1).tolist(), tokens.t5_mask.sum(1).tolist(), strict=True)
        return [
            TextEntry(
                source_states=states[i, :count].to("cpu", self.dtype).clone(),
                t5_ids=tokens.t5_ids[i, :t5_count].clone(),
            )
            for i, (count, t5_count) in enumerate(counts)
        ]

    def _qwen_length(self, text: str) -> int:
        lengths = self.tokens.lengths.get(text)
        return 0 if lengths is None else lengths.qwen

    @property
    def _encoder_name(self) -> str:
        return Path(given(self.models.qwen3, "qwen3")).name

    def _tokens(self, texts: list[str]) -> TokenBatch:
        return self.tokenizers.encode(texts, *self.token_limits)

    def _origin(self, job: TextJob) -> dict[str, str]:
        source = "sd-scripts cache" if job.legacy is not None else self._encoder_name
        return {"form": self.form, "caption": job.text, "encoder": source, "dtype": str(self.dtype)}


def pad_rows(rows: Sequence[Tensor], length: int) -> Tensor:
    """Tensors [S_i, ...] as one [B, length, ...], zeros after the real rows."""
    out = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _require_finite(x: Tensor, jobs: Sequence[TextJob], stage: str) -> None:
    bad = (~torch.isfinite(x)).flatten(1).any(1).tolist()
    names = [f"{job.text[:60]!r}" for job, is_bad in zip(jobs, bad, strict=True) if is_bad]
    if names:
        raise UserError(
            f"the encoding is not finite (stage: {stage}) for the caption {some(names)}: use "
            "--mixed_precision bf16 or no, or get another file of that model"
        )
