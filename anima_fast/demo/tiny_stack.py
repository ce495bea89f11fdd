"""A tiny model stack with random weights in the published file formats, for the demo and the tests.

DiT with bundled LLM adapter (prefix `net.`), Qwen3 folder with a tokenizer, VAE under its original
(Wan) names with three-dimensional kernels, T5 tokenizer. The tokenizers are trained on a few
captions. Weights are scaled by fan-in, so activations stay of order one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from torch import Tensor

from anima_fast.files import save_safetensors, write_json
from anima_fast.models.dit import AnimaDiT, DitConfig
from anima_fast.models.llm_adapter import AdapterConfig, LLMAdapter
from anima_fast.models.vae import VAE, VaeConfig
from anima_fast.models.vae_checkpoint import published_names

CORPUS = (
    "a photograph of a cat, looking at the viewer, green eyes, close up",
    "a portrait of an astronaut in an orange suit, flag, smile",
    "a cup of coffee on a wooden table, spoon, saucer, steam",
    "a rocket on the launch pad at night, smoke, lights",
    "picture, red tree, blue sky, number, image, best quality, highly detailed",
    "0 1 2 3 4 5 6 7 8 9 the of and to in is was for on with as by at from",
)
T5_VOCABULARY = 300


@dataclass(frozen=True)
class Stack:
    """Paths of the files of a stack."""

    dit: Path
    qwen3: Path
    vae: Path
    t5_tokenizer: Path


def build_stack(
    folder: Path,
    *,
    seed: int = 0,
    blocks: int = 2,
    width: int = 128,
    head_dim: int = 64,
    context_dim: int = 64,
    adapter_layers: int = 2,
    vae_width: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    captions: Iterable[str] = (),
) -> Stack:
    """Write a stack into `folder`; the same arguments give the same files.

    blocks, width, head_dim: depth, D and K of the DiT. context_dim: width of the text rows, of the
    adapter and of Qwen3. captions: further text for the tokenizers.
    """
    stack = Stack(
        folder / "dit.safetensors", folder / "qwen3", folder / "vae.safetensors", folder / "t5"
    )
    vocabulary = _train_tokenizers(stack, [*CORPUS, *captions])
    config = DitConfig(width, blocks, width // head_dim, head_dim, context_dim, 32, 4 * width)
    adapter = AdapterConfig(
        context_dim, context_dim, adapter_layers, 32, 4 * context_dim, T5_VOCABULARY, context_dim
    )
    with torch.device("meta"):
        shapes = {f"net.{k}": v.shape for k, v in AnimaDiT(config).state_dict().items()}
        own = LLMAdapter(adapter).state_dict()
    shapes |= {f"net.llm_adapter.{k}": v.shape for k, v in own.items()}
    save_safetensors(random_weights(shapes, seed, dtype), stack.dit)
    _write_qwen3(stack.qwen3, vocabulary, context_dim, seed, dtype)
    weights = random_weights(vae_shapes(VaeConfig(width=vae_width)), seed, dtype)
    save_safetensors(weights, stack.vae)
    return stack


def random_weights(
    shapes: Mapping[str, Iterable[int]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random tensors by name: norms near 1, small biases, matrices scaled by 1/√fan-in.

    A tensor depends on its own name and the seed only. A temporal kernel extent is not counted in
    the fan-in, because images use one temporal slice.
    """
    tensors = {}
    for name, shape in shapes.items():
        shape = tuple(shape)
        rng = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
        a = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
            a = 1 + 0.1 * a
        elif name.endswith("bias"):
            a = 0.05 * a
        else:
            fan_in = int(np.prod(shape[1:])) // (shape[2] if len(shape) == 5 else 1)
            a = a / max(1, fan_in) ** 0.5
        tensors[name] = a.to(dtype)
    return tensors


def vae_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """The published (Wan) names and shapes of a VAE file, temporal kernels included."""
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in VAE(config).state_dict().items()}
    shapes = {}
    for name, published in published_names(config, "wan").items():
        shape = ours[name]
        flat = "resample.1" in published or "middle.1" in published
        if published.endswith("gamma"):
            shape = (*shape, 1, 1) if "middle.1" in published else (*shape, 1, 1, 1)
        elif published.endswith("weight") and not flat:
            shape = (*shape[:2], 3 if shape[-1] == 3 else 1, *shape[2:])
        shapes[published] = shape
    w = config.width
    for part, index, out, into in (
        ("encoder.downsamples", 5, 2 * w, 2 * w),
        ("encoder.downsamples", 8, 4 * w, 4 * w),
        ("decoder.upsamples", 3, 8 * w, 4 * w),
        ("decoder.upsamples", 7, 8 * w, 4 * w),
    ):
        shapes[f"{part}.{index}.time_conv.weight"] = (out, into, 3, 1, 1)
        shapes[f"{part}.{index}.time_conv.bias"] = (out,)
    return shapes


def _train_tokenizers(stack: Stack, corpus: list[str]) -> int:
    """Byte-level BPE for Qwen3 and a unigram model for T5; returns the size of the first."""
    qwen = Tokenizer(models.BPE())
    qwen.normalizer = normalizers.NFC()
    qwen.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    qwen.decoder = decoders.ByteLevel()
    pairs = BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    qwen.train_from_iterator(corpus, pairs)
    write_json(stack.qwen3 / "tokenizer.json", json.loads(qwen.to_str()))

    t5 = Tokenizer(models.Unigram())
    t5.normalizer = normalizers.NFKC()
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    unigrams = UnigramTrainer(
        vocab_size=T5_VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    t5.train_from_iterator(corpus, unigrams)
    t5.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    values = json.loads(t5.to_str())
    special, learnt = values["model"]["vocab"][:3], values["model"]["vocab"][3:]
    # The trainer sums in another order each time: scores differ in their last digits, and equal
    # ones come in any order.
    scores = sorted((-round(score, 6), piece) for piece, score in learnt)
    values["model"]["vocab"] = [*special, *([piece, -score] for score, piece in scores)]
    write_json(stack.t5_tokenizer / "tokenizer.json", values)
    return qwen.get_vocab_size()


def _write_qwen3(folder: Path, vocabulary: int, width: int, seed: int, dtype: torch.dtype) -> None:
    """A two-layer Qwen3 in Hugging Face's folder layout."""
    from transformers import Qwen3Config, Qwen3Model

    head_dim = 32
    config = {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": max(2, width // head_dim),
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    write_json(folder / "config.json", config)
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**config))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    save_safetensors(random_weights(shapes, seed, dtype), folder / "model.safetensors")


def save_vae(vae: VAE, path: Path) -> None:
    """Write a VAE under its published (Wan) names and shapes.

    Each 3x3 kernel becomes the last temporal slice of a 3x3x3 one, the slice that a still image
    meets; the other slices and the temporal resampling are zero.
    """
    ours = vae.state_dict()
    tensors = {name: torch.zeros(shape) for name, shape in vae_shapes(vae.config).items()}
    for name, published in published_names(vae.config, "wan").items():
        target = tensors[published]
        place = target[:, :, -1] if target.ndim == 5 else target
        place.copy_(ours[name].detach().reshape(place.shape))
    save_safetensors(tensors, path)
