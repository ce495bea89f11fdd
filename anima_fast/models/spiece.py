"""Reads a sentencepiece model file (`spiece.model`) into a fast unigram tokenizer.

The file is one protobuf message, of which three fields matter; reading them here needs neither
sentencepiece nor protobuf:

    ModelProto: 1 = pieces (1 = text, 2 = score), 3 = normalizer (2 = precompiled character map)

Wire format: a varint tag (field << 3 | type); type 0 varint, 1 eight bytes, 2 length-prefixed,
5 four bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# T5 adds these after its 32,000 pieces, numbered downwards.
EXTRA_IDS = 100


def read_spiece(path: str | Path) -> Tokenizer:
    """The T5 tokenizer of a spiece.model file; raises `UserError` when it is damaged."""
    try:
        return _build(Path(path).read_bytes())
    except (ValueError, IndexError, struct.error, KeyError) as error:
        raise UserError(f"{path} is not a sentencepiece model ({error}): get it again") from error


def _build(data: bytes) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    pieces, charsmap = _pieces(data)
    if [text for text, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise ValueError("its first pieces are not those of T5")
    extra = [f"<extra_id_{i}>" for i in reversed(range(EXTRA_IDS))]
    model = models.Unigram([*pieces, *((text, 0.0) for text in extra)], 2, False)
    tokenizer = Tokenizer(model)
    squeeze = normalizers.Replace(Regex(" {2,}"), " ")
    parts = [normalizers.Precompiled(charsmap)] if charsmap else []
    tokenizer.normalizer = normalizers.Sequence([*parts, squeeze])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>", *extra]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def _pieces(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    pieces, charsmap = [], b""
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
            pieces.append((piece[1].decode("utf-8"), score))
        elif field == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    return pieces, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, raw bytes) of a message; varints, which nobody needs, come as empty bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            size, at = 0, _varint(data, at)[1]
        elif kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if at + size > len(data):
            raise ValueError("it is cut off")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The value and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number in it is too long")
