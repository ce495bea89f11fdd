"""The two tokenizers of a caption: Qwen3 (byte-level BPE) for meaning, T5 (unigram) for queries.

    Qwen3: no special tokens, empty caption = no token, pad <|endoftext|>
    T5:    </s> appended and kept when truncating, empty caption = [</s>], pad <pad>

Both read the same raw caption, and strings of special tokens inside it count as those tokens. Ids
are padded on the right to the longest caption of the batch: padding does not act.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.spiece import read_spiece
from anima_fast.models.tokenizer_files import QWEN3, T5, find_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Contractions, words, single digits, punctuation runs, line ends, spaces.
QWEN3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenBatch:
    """Ids and masks of a batch of captions, int64 [B, N]; N differs between Qwen3 and T5."""

    qwen_ids: Tensor
    qwen_mask: Tensor
    t5_ids: Tensor
    t5_mask: Tensor


class Tokenizers:
    """Both tokenizers; `identity` is a hash of their files, for cache keys."""

    def __init__(self, qwen: Tokenizer, t5: Tokenizer, identity: str) -> None:
        """Raises `UserError` when the T5 tokenizer has no `</s>`."""
        for tokenizer in (qwen, t5):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.qwen, self.t5, self.identity = qwen, t5, identity
        self.qwen_pad = qwen.token_to_id("<|endoftext|>") or 0
        self.t5_pad = t5.token_to_id("<pad>") or 0
        end = t5.token_to_id("</s>")
        if end is None:
            raise UserError(
                "the T5 tokenizer has no </s> token: it is not a T5 tokenizer; give another with "
                f"{T5.option}"
            )
        self.t5_end: int = end

    def encode(
        self, captions: Sequence[str], qwen3_max: int = TEXT_ROWS, t5_max: int = TEXT_ROWS
    ) -> TokenBatch:
        """Ids and masks of captions, truncated on the right to the given lengths (tokens)."""
        if qwen3_max < 1 or t5_max < 1:
            raise ValueError(f"lengths are {qwen3_max} and {t5_max}, expected at least 1")
        qwen = [ids[:qwen3_max] for ids in _ids(self.qwen, captions)]
        t5 = [[*ids[: t5_max - 1], self.t5_end] for ids in _ids(self.t5, captions)]
        return TokenBatch(*_pad(qwen, self.qwen_pad), *_pad(t5, self.t5_pad))

    def encode_segments(self, segments: Sequence[str]) -> tuple[TokenBatch, list[int]]:
        """Ids and masks [1, N] of untruncated segments and a final `</s>`; T5 tokens of each."""
        qwen = [token for ids in _ids(self.qwen, segments) for token in ids]
        parts = _ids(self.t5, segments)
        t5 = [*(token for ids in parts for token in ids), self.t5_end]
        batch = TokenBatch(*_pad([qwen], self.qwen_pad), *_pad([t5], self.t5_pad))
        return batch, [len(ids) for ids in parts]

    def qwen_lengths(self, captions: Sequence[str]) -> list[int]:
        """Qwen3 tokens per caption, before truncation."""
        return [len(ids) for ids in _ids(self.qwen, captions)]

    def t5_lengths(self, captions: Sequence[str]) -> list[int]:
        """T5 tokens per caption with `</s>`, before truncation."""
        return [len(ids) + 1 for ids in _ids(self.t5, captions)]

    def kept_length(self, caption: str, limits: tuple[int, int]) -> int:
        """Characters of a caption before the first token beyond the limits of Qwen3 and T5."""
        length = len(caption)
        for tokenizer, limit in ((self.qwen, limits[0]), (self.t5, limits[1] - 1)):
            encoding = tokenizer.encode(caption, add_special_tokens=False)
            if len(encoding.ids) > limit:
                length = min(length, encoding.offsets[limit][0])
        return length


def _ids(tokenizer: Tokenizer, captions: Sequence[str]) -> list[list[int]]:
    encodings = tokenizer.encode_batch(list(captions), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _pad(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, N], N the longest row and at least 1."""
    length = max([1, *(len(row) for row in rows)])
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], dtype=torch.int64)
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    mask = (torch.arange(length) < counts[:, None]).long()
    return ids.view(len(rows), length), mask


def load_tokenizers(
    qwen3_path: str | Path | None,
    *,
    qwen3_tokenizer_path: str | Path | None = None,
    t5_tokenizer_path: str | Path | None = None,
    models_dir: str | Path | None = None,
    fetch: bool = True,
) -> Tokenizers:
    """Both tokenizers, searched as `tokenizer_files` describes.

    qwen3_path: the text encoder, a directory or a single file. fetch: ask the hub for what is not
    found. Raises `UserError` when files are damaged or missing (`tokenizer_files.TokenizerMissing`
    when no path was given for them).
    """
    qwen_files = find_files(QWEN3, qwen3_path, qwen3_tokenizer_path, models_dir, fetch=fetch)
    t5_files = find_files(T5, qwen3_path, t5_tokenizer_path, models_dir, fetch=fetch)
    sentencepiece = t5_files[0].name == "spiece.model"
    qwen = _read(qwen_files)
    t5 = read_spiece(t5_files[0]) if sentencepiece else _read(t5_files)
    digest = hashlib.sha256()
    for file in (*qwen_files, *t5_files):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return Tokenizers(qwen, t5, digest.hexdigest())


def _read(files: Sequence[Path]) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of vocab.json, merges.txt and its config."""
    from tokenizers import Tokenizer

    try:
        if len(files) > 1:
            return _of_vocabulary(*files)
        return Tokenizer.from_str(files[0].read_text(encoding="utf-8"))
    # The tokenizers library raises plain Exception for a damaged file.
    except Exception as error:
        path = files[0].parent if len(files) > 1 else files[0]
        brief = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not a readable tokenizer ({brief}): download it again"
        ) from error


def _of_vocabulary(vocabulary: Path, merges: Path, config: Path) -> Tokenizer:
    """Byte-level BPE of vocab.json and merges.txt with the added tokens of the config."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    added = json.loads(config.read_text(encoding="utf-8"))["added_tokens_decoder"]
    tokenizer = Tokenizer(models.BPE(*models.BPE.read_file(str(vocabulary), str(merges))))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN3_SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    _add_tokens(tokenizer, added)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, added: dict[str, dict]) -> None:
    """Add tokens with their flags; they must take the ids that the config gives them."""
    from tokenizers import AddedToken

    for number, token in sorted(added.items(), key=lambda entry: int(entry[0])):
        flags = {k: token.get(k, False) for k in ("lstrip", "rstrip", "normalized", "single_word")}
        content = AddedToken(token["content"], special=token.get("special", False), **flags)
        add = tokenizer.add_special_tokens if content.special else tokenizer.add_tokens
        add([content])
        if tokenizer.token_to_id(token["content"]) != int(number):
            raise ValueError(f"added token {token['content']} does not get its id {number}")
