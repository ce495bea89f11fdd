"""Tiny models with the interfaces of the real ones that count their work, and a small dataset."""

from __future__ import annotations

import weakref
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from anima_fast.data import encode_text
from anima_fast.data.plan import build_plan
from anima_fast.models.tokenizers import TokenBatch
from anima_fast.options.run import TrainOptions

WIDTH = 8


class FakeVae(nn.Module):
    """Average of each 8x8 patch, on 16 channels. `nan_below` makes dark images overflow in bf16."""

    def __init__(self, work, dtype):
        super().__init__()
        self.work, self.dtype = work, dtype

    def encode(self, images, chunk_rows=None):
        self.work.batches.append(len(images))
        self.work.chunk_rows.add(chunk_rows)
        self.work.count["vae"] += len(images)
        if self.work.fail_after is not None and self.work.count["vae"] > self.work.fail_after:
            raise KeyboardInterrupt
        pooled = nn.functional.avg_pool2d(images.float(), 8)  # [B, 3, h, w]
        latents = torch.cat([pooled] * 6, 1)[:, :16] * torch.arange(1, 17)[:, None, None]
        dark = pooled.mean((1, 2, 3)) < -0.9
        latents[dark & (self.work.always_nan or self.dtype != torch.float32)] = float("nan")
        return latents


class FakeEncoder(nn.Module):
    def __init__(self, work, dtype):
        super().__init__()
        self.work, self.dtype = work, dtype

    def forward(self, ids, mask):
        self.work.count["encoder"] += len(ids)
        if self.work.fail_after is not None and self.work.count["encoder"] > self.work.fail_after:
            raise KeyboardInterrupt
        states = torch.sin(ids[..., None].float() * torch.arange(1, WIDTH + 1))
        states[ids == self.work.poison] = float("inf")
        return (states * mask[..., None]).nan_to_num(posinf=float("inf")).to(self.dtype)


class FakeAdapter(nn.Module):
    def __init__(self, work, dtype):
        super().__init__()
        self.work, self.dtype = work, dtype

    def forward(self, t5_ids, t5_mask, states, mask):
        self.work.count["adapter"] += len(t5_ids)
        own = torch.cos(t5_ids[..., None].float() * torch.arange(1, WIDTH + 1))
        total = (states.float() * mask[..., None]).sum(1, keepdim=True)
        return ((own + total) * t5_mask[..., None]).to(self.dtype)


class FakeTokenizers:
    identity = "fake"

    def _words(self, caption):
        return [zlib.crc32(word.encode()) % 1000 + 2 for word in caption.split()]

    def qwen_lengths(self, captions):
        return [len(self._words(c)) for c in captions]

    def t5_lengths(self, captions):
        return [len(self._words(c)) + 1 for c in captions]

    def encode(self, captions, qwen3_max=512, t5_max=512):
        qwen = [self._words(c)[:qwen3_max] for c in captions]
        t5 = [[*self._words(c)[: t5_max - 1], 1] for c in captions]
        return TokenBatch(*pad(qwen), *pad(t5))


def pad(rows):
    length = max(1, *(len(row) for row in rows)) if rows else 1
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


class Work:
    """What the fakes did: images and captions by model, models loaded, weak references to them."""

    def __init__(self):
        self.count, self.loads = Counter(), Counter()
        self.batches, self.chunk_rows, self.alive = [], set(), []
        self.fail_after, self.always_nan, self.poison = None, False, -1

    def reset(self):
        self.__init__()

    def make(self, name, cls, dtype):
        self.loads[name] += 1
        model = cls(self, dtype)
        self.alive.append(weakref.ref(model))
        return model


def install(monkeypatch):
    """Put the fakes in the place of the loaders; returns their `Work`."""
    from anima_fast.models import llm_adapter, text_encoder, tokenizers, vae_checkpoint

    work = Work()
    monkeypatch.setattr(
        vae_checkpoint, "load_vae", lambda path, *, device, dtype: work.make("vae", FakeVae, dtype)
    )
    monkeypatch.setattr(
        text_encoder,
        "load_text_encoder",
        lambda path, *, device, dtype: work.make("encoder", FakeEncoder, dtype),
    )
    monkeypatch.setattr(tokenizers, "load_tokenizers", lambda *a, **k: FakeTokenizers())
    monkeypatch.setattr(
        llm_adapter,
        "load_llm_adapter",
        lambda path, *, device, dtype: work.make("adapter", FakeAdapter, dtype),
    )
    monkeypatch.setattr(llm_adapter, "has_llm_adapter", lambda path: "adapter" in Path(path).name)
    monkeypatch.setattr(encode_text, "source_width", lambda options: WIDTH)
    return work


def picture(path, shade, size=(64, 64), alpha=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    pixels[:, : size[0] // 2, 0] = 255 - shade
    if alpha is not None:
        plane = np.full((size[1], size[0], 1), alpha, np.uint8)
        plane[:, : size[0] // 2] = 0
        pixels = np.concatenate([pixels, plane], 2)
    Image.fromarray(pixels).save(path)


CAPTIONS = ("a red cat", "a dog", "one two three four five", "grass")


class Project:
    """A folder with images, captions, a dataset file and model files; `encode` runs the phases."""

    def __init__(self, root, work):
        self.root, self.work, self.notices = root, work, []
        self.images = root / "images"
        self.subset, self.dataset, self.general = "", "batch_size = 2", ""
        self.settings = {"cache_latents": True, "cache_text_encoder_outputs": True}
        for i, caption in enumerate(CAPTIONS):
            picture(self.images / f"{i}.png", 60 + 40 * i)
            (self.images / f"{i}.txt").write_text(caption, encoding="utf-8")
        for name in ("dit_adapter", "qwen3", "vae"):
            (root / f"{name}.safetensors").write_bytes(name.encode())

    def options(self, **more):
        (self.root / "data.toml").write_text(
            f"[general]\nresolution = 64\n{self.general}\n[[datasets]]\n{self.dataset}\n"
            f"[[datasets.subsets]]\nimage_dir = '{self.images.as_posix()}'\n{self.subset}\n",
            encoding="utf-8",
        )
        paths = {
            "pretrained_model_name_or_path": str(self.root / "dit_adapter.safetensors"),
            "qwen3": str(self.root / "qwen3.safetensors"),
            "vae": str(self.root / "vae.safetensors"),
            "output_dir": str(self.root / "out"),
            "dataset_config": str(self.root / "data.toml"),
            "max_data_loader_n_workers": 2,
        }
        return TrainOptions(**{**paths, **self.settings, **more})

    def encode(self, *, vae_dtype=torch.float32, text_dtype=torch.float32, **more):
        """(plan, encoded, options); the work of this call alone is in `work` afterwards."""
        from anima_fast.data.encode import encode_dataset

        fail_after, nan, poison = self.work.fail_after, self.work.always_nan, self.work.poison
        self.work.reset()
        self.work.fail_after, self.work.always_nan, self.work.poison = fail_after, nan, poison
        options = self.options(**more)
        plan = build_plan(options)
        self.notices = []
        encoded = encode_dataset(
            plan, options, vae_dtype=vae_dtype, text_dtype=text_dtype, say=self.notices.append
        )
        return plan, encoded, options

    def cache_files(self, ending):
        return sorted((self.images / ".anima_cache").glob(f"*.{ending}.safetensors"))
