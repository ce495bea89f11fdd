"""The caption phase: every caption of the run, and the empty one, as a text cache file.

A caption whose parts are random is cached in several renderings (`caption_variants`). The form is
"context", the LLM adapter's output, or "states" when the adapter is trained: Qwen3 states and T5
ids, from which it computes the context in every step.

A caption within 512 tokens is encoded the same way whatever `long_captions` says and keeps its
file; the file of a longer one belongs to either form.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from anima_fast.data import cache, legacy_cache
from anima_fast.data.cache import CacheError, Stored, TextEntry
from anima_fast.data.cache_folders import file_hashes, text_name
from anima_fast.data.caption_tokens import CaptionTokens
from anima_fast.data.encode_models import adapter_path, source_width
from anima_fast.data.encode_phase import EncodeJob, EncodePhase
from anima_fast.data.items import ImageItem
from anima_fast.data.layouts import some
from anima_fast.errors import UserError
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.model_files import given
from anima_fast.models.tokenizers import TokenBatch, Tokenizers


@dataclass(frozen=True)
class TextJob(EncodeJob):
    """One cache file, its caption, and sd-scripts' encoding where it is used."""

    text: str
    legacy: TextEntry | None = None


@dataclass
class TextPhase(EncodePhase[TextJob, TextEntry]):
    """Encodes captions in one form."""

    tokenizers: Tokenizers
    tokens: CaptionTokens
    form: str
    batch_size: int

    unit = "captions"
    read = staticmethod(cache.read_text)

    def run(
        self, items: Sequence[ImageItem], texts: Sequence[Sequence[str]]
    ) -> tuple[list[tuple[Stored[TextEntry], ...]], Stored[TextEntry]]:
        """The renderings `texts` of each item's caption as entries, and the entry of "".

        Raises `UserError` as `encode`.
        """
        # Each text once, with the image whose folder holds its file.
        owners = {"": items[0].path}
        single: dict[str, list[Path]] = defaultdict(list)
        for item, variants in zip(items, texts, strict=True):
            for text in variants:
                owners.setdefault(text, item.path)
            if len(variants) == 1:
                single[variants[0]].append(item.path)
        keys = {text: self._key(text) for text in owners}
        opened = {text: self._find(keys[text], image) for text, image in owners.items()}
        stored = {text: entry for text, entry in opened.items() if entry is not None}
        legacy = self._legacy({t: images for t, images in single.items() if t not in stored})
        missing: dict[str, TextJob] = {}
        for text in (text for text in owners if text not in stored):
            found = legacy.get(text)
            if isinstance(found, Stored):
                stored[text] = found
            else:
                place = self.folders.place(text_name(keys[text]), owners[text])
                missing[text] = found or TextJob(keys[text], place, text)
        encoded = self.encode(list(missing.values())) if missing else {}
        stored |= {text: encoded[job.path] for text, job in missing.items()}
        return [tuple(stored[t] for t in variants) for variants in texts], stored[""]

    @cached_property
    def _key_parts(self) -> dict[str, object]:
        parts: dict[str, object] = {
            "kind": "text",
            "form": self.form,
            "tokenizers": self.tokenizers.identity,
            "encoder": cache.model_identity(given(self.options.qwen3, "qwen3")),
            "dtype": str(self.models.dtype),
        }
        if self.form == "context":
            parts["adapter"] = cache.model_identity(adapter_path(self.options))
        return parts

    def _key(self, text: str, **other: object) -> str:
        """Key of a text's file; `other` replaces parts."""
        lengths = self.tokens.lengths.get(text)
        short = self.tokens.whole and (lengths is None or lengths.longest <= TEXT_ROWS)
        limits = [TEXT_ROWS, TEXT_ROWS] if short else list(self.options.token_limits)
        return cache.digest({**self._key_parts, "lengths": limits, "text": text, **other})

    def _find(self, key: str, image: Path) -> Stored[TextEntry] | None:
        path = self.folders.find(text_name(key), image, anywhere=True)
        if path is None:
            return None
        return self.open(path, partial(cache.check_text, path, key, self.form))

    def _legacy(self, owners: dict[str, list[Path]]) -> dict[str, Stored[TextEntry] | TextJob]:
        """What sd-scripts has encoded for these texts: as an entry, or as a job for the adapter."""
        files = {
            text: [path for path in map(legacy_cache.text_path, images) if path.is_file()]
            for text, images in owners.items()
        }
        hashes = file_hashes(self.folders, chain(*files.values()), 1)
        found: dict[str, Stored[TextEntry] | TextJob] = {}
        stale: list[str] = []
        for text, paths in files.items():
            for path in paths:
                key = self._key(text, encoder=f"sd-scripts:{hashes[path]}")
                try:
                    found[text] = self._find(key, path) or self._legacy_job(text, key, path)
                    break
                except CacheError as error:
                    stale.append(f"{path.name}: {error}")
        if found:
            self.say(
                f"{len(found)} text encodings are used from *_anima_te.npz files, which do not "
                "show whether the text encoder has changed"
            )
        if stale:
            self.say(f"{len(stale)} text files are encoded again ({some(stale)})")
        return found

    def _legacy_job(self, text: str, key: str, path: Path) -> TextJob:
        """Raises `CacheError` for an encoding of another caption or by another encoder."""
        legacy, count = legacy_cache.read_text(path)
        assert legacy.t5_ids is not None and legacy.source_states is not None
        tokens = self._tokens([text])
        same_ids = torch.equal(tokens.t5_ids[0][tokens.t5_mask[0].bool()], legacy.t5_ids)
        # T5 knows no Chinese or Japanese; the count of Qwen3 tokens shows more edits there.
        if not same_ids or int(tokens.qwen_mask.sum()) != count:
            is_cut = len(legacy.t5_ids) >= TEXT_ROWS and tokens.t5_ids.shape[1] > len(legacy.t5_ids)
            raise CacheError("cut off at 512 tokens" if is_cut else "made from another caption")
        if legacy.source_states.shape[1] != source_width(self.options):
            raise CacheError("made by another text encoder")
        return TextJob(key, self.folders.place(text_name(key), path), text, legacy)

    def entries(self, jobs: list[TextJob]) -> Iterator[tuple[TextJob, TextEntry]]:
        """Encode in batches of similar length, long ones first; sd-scripts' encodings apart."""
        jobs = sorted(jobs, key=lambda job: (-self._qwen_length(job.text), job.text))
        for is_legacy in (False, True):
            same = [job for job in jobs if (job.legacy is not None) == is_legacy]
            for i in range(0, len(same), self.batch_size):
                batch = same[i : i + self.batch_size]
                yield from zip(batch, self._encode_batch(batch), strict=True)

    def origin(self, job: TextJob) -> dict[str, str]:
        """The caption, and what encoded it."""
        encoder = Path(given(self.options.qwen3, "qwen3")).name
        source = encoder if job.legacy is None else "sd-scripts cache"
        dtype = str(self.models.dtype)
        return {"form": self.form, "caption": job.text, "encoder": source, "dtype": dtype}

    @torch.no_grad()
    def _encode_batch(self, jobs: list[TextJob]) -> list[TextEntry]:
        device, dtype = self.models.device, self.models.dtype
        tokens = self._tokens([job.text for job in jobs])
        mask = tokens.qwen_mask.to(device)
        try:
            rows = [job.legacy.source_states for job in jobs if job.legacy is not None]
            if rows:
                states = pad_rows(rows, mask.shape[1]).to(device, dtype)
            else:
                states = self.models.encoder(tokens.qwen_ids.to(device), mask)
            _require_finite(states, jobs, "Qwen3 text encoder")
            if self.form == "states":
                return self._state_entries(tokens, states)
            t5_ids, t5_mask = tokens.t5_ids.to(device), tokens.t5_mask.to(device)
            context = self.models.adapter(t5_ids, t5_mask, states.to(dtype), mask)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory while encoding {len(jobs)} captions: use "
                "--text_encoder_batch_size 1"
            ) from error
        _require_finite(context, jobs, "LLM adapter")
        counts = tokens.t5_mask.sum(1).tolist()
        return [
            TextEntry(context=rows[:count].to("cpu", dtype).clone())
            for rows, count in zip(context, counts, strict=True)
        ]

    def _state_entries(self, tokens: TokenBatch, states: Tensor) -> list[TextEntry]:
        counts = zip(tokens.qwen_mask.sum(1).tolist(), tokens.t5_mask.sum(1).tolist(), strict=True)
        return [
            TextEntry(
                source_states=states[i, :count].to("cpu", self.models.dtype).clone(),
                t5_ids=tokens.t5_ids[i, :t5_count].clone(),
            )
            for i, (count, t5_count) in enumerate(counts)
        ]

    def _qwen_length(self, text: str) -> int:
        lengths = self.tokens.lengths.get(text)
        return 0 if lengths is None else lengths.qwen

    def _tokens(self, texts: list[str]) -> TokenBatch:
        return self.tokenizers.encode(texts, *self.options.token_limits)


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
