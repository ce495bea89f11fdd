"""Predicted peak memory of LoRA training, from the shapes in the model files and the options.

    training = frozen weights + adapters, their gradients, optimizer state and running mean
             + what each block keeps for backward + what one block's backward needs
             + models that stay because nothing is cached

Weights, adapters, gradients and optimizer state are exact. What fused blocks keep are units of one
[B, L, D] tensor, counted at the published width; what eager blocks and a trained text path keep is
counted on the run's own adapters (kept.py). Encoding and previews are phases of their own: the
models of one are not in memory together with those of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from anima_fast.adapters.targets import find_targets
from anima_fast.memory.kept import BlockCount, Storages, kept, size, storages
from anima_fast.memory.offload import SaverSettings
from anima_fast.memory.plan import (
    WORKSPACE_UNITS,
    Item,
    Modes,
    Needs,
    Phase,
    Prediction,
    stored_bytes,
)
from anima_fast.memory.swap import swapped_indices, swapped_parameters
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.dit_config import PUBLISHED, TEXT_ROWS
from anima_fast.models.text_encoder import read_sizes

if TYPE_CHECKING:
    from anima_fast.adapters.network import LoRANetwork
    from anima_fast.models.llm_adapter import LLMAdapter
    from anima_fast.models.text_encoder import TextEncoder
    from anima_fast.models.vae import VAE
    from anima_fast.options.run import TrainOptions

# Kept by a fused block, by policy, counted by tests/test_block.py at L = 1024, S = 96, rank 32; the
# fraction is text keys and values, log-sum-exps, the adapters' products and modulation.
SAVED_UNITS = {"none": 13.53, "mlp": 9.51, "block": 1.18}
# The text rows of that count, for each token: longer captions keep more, keys and values.
COUNTED_ROWS = 96 / 1024
# On top of these, where AdaLN layers have adapters: the results of the three sublayers; and where
# attention runs under autograd inside the block: its normed queries and keys.
ADALN_UNITS, AUTOGRAD_UNITS = 3.0, 3.0
# Full-resolution maps of the VAE, [B, its width, H, W] each, that are in memory together: counted
# by tests/test_lora_plan.py.
ENCODE_UNITS, DECODE_UNITS = 3.03, 3.51
# What strips of `vae_chunk_size` rows take, in pictures of that many rows, at most.
STRIPS = 4
ASSUMED = (
    "what one block's backward needs (14 units of one [B, L, D] tensor); no card has measured it",
    "temporaries of libraries and fragments stay within the 5 % that are left free",
)
REMEDIES: tuple[dict, ...] = (
    {"cache_latents": True},
    {"cache_text_encoder_outputs": True},
    {"recompute": "mlp"},
    {"gradient_checkpointing": True, "recompute": "block"},
    {"optimizer_type": "AdamW8bit", "optimizer_args": ()},
)


class BlockBytes(NamedTuple):
    """Of one block: what it keeps for backward, and what backward recomputes on top of that."""

    kept: float
    again: float = 0.0


def fused_block(policy: str, unit: float, *, more: float = 0.0) -> BlockBytes:
    """A fused block under a policy.

    Args:
        policy: none, mlp, block or host (nothing is kept on the device).
        unit: bytes of one [B, L, D] tensor of the compute dtype.
        more: units kept besides, unless all is recomputed.
    """
    whole = SAVED_UNITS["none"] + more
    kept = {
        "none": whole,
        "mlp": SAVED_UNITS["mlp"] + more,
        "block": SAVED_UNITS["block"],
        "host": 0.0,
    }[policy]
    return BlockBytes(kept * unit, (whole - kept) * unit)


def training_items(
    weights: int,
    adapters: Sequence[Item],
    blocks: Sequence[BlockBytes],
    unit: float,
    *,
    around: int = 0,
) -> tuple[Item, ...]:
    """What is on the device in the backward pass, in bytes.

    Args:
        weights: the frozen DiT there.
        adapters: the network and all that belongs to it.
        blocks: of all blocks.
        unit: one [B, L, D] tensor.
        around: kept by other layers than the blocks'.
    """
    workspace = WORKSPACE_UNITS * unit + max((block.again for block in blocks), default=0.0)
    return (
        Item("weights", weights, "frozen weights"),
        *adapters,
        Item("activations", int(sum(b.kept for b in blocks) + around), "kept for backward"),
        Item("workspace", int(workspace), "workspace of one block's backward"),
    )


@dataclass(frozen=True)
class Models:
    """The models of a run on the meta device, in the dtypes of the run, with the network attached.

    The text encoder and the LLM adapter are there when they stay in training, the VAE always.
    """

    dit: AnimaDiT
    network: LoRANetwork
    vae: VAE
    adapter: LLMAdapter | None = None
    text_encoder: TextEncoder | None = None


@dataclass(frozen=True)
class LoRANeeds(Needs["TrainOptions"]):
    """The prediction for a LoRA.

    Attributes:
        models: see `Models`.
        fused: whether the run takes the fused blocks, as far as options and device decide.
        text_batch: captions that are encoded together.
        preview: pixels of the largest preview; 0 without previews.
    """

    models: Models
    fused: bool
    text_batch: int = 1
    preview: int = 0
    subject = "this LoRA"
    remedies = REMEDIES
    # `block` is what is left of `mlp`.
    together = tuple(r for r in REMEDIES if r.get("recompute") != "mlp")
    last_resort = "use a smaller resolution or batch size"

    @property
    def blocks(self) -> int:
        """Of the DiT."""
        return len(self.models.dit.blocks)

    def __call__(self, options: TrainOptions) -> Prediction:
        """The predicted peaks."""
        modes = self.modes(options)
        in_host = self._swapped(options)
        # Of swapped blocks, two visit the device.
        weights = bytes_of(self.models.dit) - sum(in_host) + sum(sorted(in_host)[-2:])
        # What eager blocks leave to the layers around them is within a fused block's units.
        around = self.text_kept + (0 if self.runs_fused else self.eager.around)
        adapters, blocks = self._adapters(options), self._block_bytes(options)
        training = training_items(weights, adapters, blocks, self.unit, around=around)
        resting = [item for item in training if item.key not in ("activations", "workspace")]
        staying = Item("other", self._other_models(modes), "other models")
        phases = self._encoding(options, modes)
        if modes.image == "live":
            maps = self._maps(options, ENCODE_UNITS, self.batch.images * self.batch.pixels)
            encode = Item("encode", maps, "encoding of the batch")
            phases.append(Phase("training", (*resting, staying, encode)))
        phases.append(Phase("training", (*training, *self._graphs(options, training), staying)))
        if self.preview:
            # The VAE decodes a preview while the DiT and all of the network stay.
            vae = 0 if modes.image == "live" else bytes_of(self.models.vae)
            maps = self._maps(options, DECODE_UNITS, self.preview)
            more = (Item("vae", vae, "VAE"), Item("maps", maps, "preview in the VAE"))
            phases.append(Phase("previews", (*resting, staying, *more)))
        waiting = self.blocks * self.input_bytes if SaverSettings.of(options).offload else 0
        return Prediction(tuple(phases), self.program + sum(in_host) + waiting, ASSUMED)

    def allows(self, before: TrainOptions, after: TrainOptions) -> bool:
        """Whether the same is trained."""
        return before.trains_text_encoder == after.trains_text_encoder

    def _swapped(self, options: TrainOptions) -> list[int]:
        """Bytes of each swapped block in host memory."""
        blocks = self.models.dit.blocks
        return [
            sum(p.nbytes for p in swapped_parameters(blocks[i], fused=self.runs_fused).values())
            for i in swapped_indices(len(blocks), options.blocks_to_swap or 0)
        ]

    def _adapters(self, options: TrainOptions) -> tuple[Item, ...]:
        """The network, its gradients, the optimizer's state and the running mean."""
        network = self.models.network
        mean = 4 * network.flat.numel() if options.ema_decay is not None else 0
        return (
            Item("parameters", network.flat.nbytes, "adapters"),
            Item("gradients", network.flat_grad.nbytes, "gradients of the adapters"),
            Item("state", int(self.state_bytes(options)), "optimizer state"),
            Item("mean", mean, "running mean of the adapters"),
        )

    # Activations

    @property
    def unit(self) -> int:
        """Bytes of one [B, L, D] tensor of the compute dtype."""
        dit, batch = self.models.dit, self.batch
        width = dit.config.model_channels * dit.dtype.itemsize
        return batch.images * batch.tokens * width

    @property
    def input_bytes(self) -> int:
        """Of what a recomputed block keeps; between eager blocks float16 is too narrow."""
        wide = self.models.dit.dtype == torch.float16 and not self.fused
        return self.unit * (2 if wide else 1)

    @cached_property
    def runs_fused(self) -> bool:
        """Whether the fused blocks take the adapters on (models/fuse.py)."""
        for name, adapter in self.models.network.modules_by_name.items():
            if name.startswith("blocks.") and adapter.title != "LoRA":
                return False
            if "adaln" in name and adapter.drops:
                return False
        return self.fused

    @cached_property
    def eager(self) -> BlockCount:
        """What eager blocks keep."""
        dit, batch = self.models.dit, self.batch
        # Any picture of as many tokens keeps the same.
        shape = (batch.images, dit.config.in_channels, 2, 2 * batch.tokens)
        latents = torch.empty(shape, device="meta", dtype=dit.dtype)
        rows = (batch.images, batch.rows, dit.config.context_dim)
        context = torch.empty(rows, device="meta", dtype=dit.dtype)
        context.requires_grad_(self.trains_text)
        zeros = max(TEXT_ROWS - batch.rows, 0)
        adapters = self.models.network.parameters()
        return BlockCount(dit, adapters).count(latents, context, zero_keys=zeros)

    @property
    def trains_text(self) -> bool:
        """Whether the text path has trained modules."""
        prefixes = ("llm_adapter.", "text_encoder.")
        return any(name.startswith(prefixes) for name in self.models.network.modules_by_name)

    def _block_bytes(self, options: TrainOptions) -> list[BlockBytes]:
        """Of every block."""
        settings = SaverSettings.of(options, options.cuda_graphs)
        policies = settings.policies(self.blocks, fused=self.fused)
        for index in swapped_indices(self.blocks, settings.blocks_to_swap):
            policies[index] = "block"
        if settings.offload:
            policies = ["host"] * self.blocks
        first = 0 if self.trains_text else self._first_adapted
        found = [BlockBytes(0.0)] * first
        return found + [self._block(options, policies[i], i) for i in range(first, self.blocks)]

    def _block(self, options: TrainOptions, policy: str, index: int) -> BlockBytes:
        if self.runs_fused:
            return fused_block(policy, self.unit, more=self._more_units(options))
        whole = float(self.eager.blocks[index])
        # The eager block cannot leave out its MLP alone, so `mlp` is `block` there.
        kept = {"none": whole, "host": 0.0}.get(policy, float(self.input_bytes))
        return BlockBytes(kept, whole - kept)

    def _more_units(self, options: TrainOptions) -> float:
        """Units that a fused block keeps besides those of `SAVED_UNITS`."""
        adaln = any("adaln" in name for name in self.models.network.modules_by_name)
        autograd = options.attn_mode in ("xformers", "flash")
        longer = 2 * max(0.0, self.batch.rows / self.batch.tokens - COUNTED_ROWS)
        return longer + ADALN_UNITS * adaln + AUTOGRAD_UNITS * autograd

    @property
    def _first_adapted(self) -> int:
        """Blocks below it keep nothing; 0 where layers around the blocks are trained."""
        names = self.models.network.modules_by_name
        if any(not name.startswith("blocks.") for name in names):
            return 0
        return min(int(name.split(".")[1]) for name in names)

    @cached_property
    def text_kept(self) -> int:
        """Kept by the trained LLM adapter and text encoder."""
        adapter, encoder = self.models.adapter, self.models.text_encoder
        if not self.trains_text or adapter is None:
            return 0
        batch, dtype = self.batch, adapter.out_proj.weight.dtype
        found: Storages = {}
        rows, words = (
            torch.ones(batch.images, length, dtype=torch.long, device="meta")
            for length in (batch.rows, batch.words)
        )
        states = torch.empty(*words.shape, adapter.config.source_width, device="meta")
        own = [*self.models.network.parameters(), *adapter.parameters()]
        if encoder is not None:
            own += encoder.parameters()
            states, found = kept(lambda: _states(encoder, words), storages(own))
        there = storages(own)
        _, more = kept(lambda: adapter(rows, rows, states.to(dtype), words), there)
        return size(found | more)

    def _graphs(self, options: TrainOptions, training: Sequence[Item]) -> tuple[Item, ...]:
        """Where graphs are asked for: the largest holds what a step needs besides weights."""
        if not (options.cuda_graphs and self.runs_fused):
            return ()
        held = sum(i.size for i in training if i.key in ("activations", "workspace"))
        return (Item("graphs", held, "CUDA graphs"),)

    # Other models and phases

    def _other_models(self, modes: Modes) -> int:
        """Bytes of the models besides the DiT that stay in training."""
        text = (self.models.adapter, self.models.text_encoder) if modes.text != "context" else ()
        vae = (self.models.vae,) if modes.image == "live" else ()
        return sum(bytes_of(model) for model in (*vae, *text) if model is not None)

    def _encoding(self, options: TrainOptions, modes: Modes) -> list[Phase]:
        """The phases before the DiT is loaded."""
        found = []
        if modes.image == "cached":
            pixels = options.vae_batch_size * self.batch.pixels
            vae = Item("vae", bytes_of(self.models.vae), "VAE")
            maps = Item("maps", self._maps(options, ENCODE_UNITS, pixels), "images in the VAE")
            found.append(Phase("encoding images", (vae, maps)))
        if modes.text != "live":
            half = options.mixed_precision != "no"
            sizes = read_sizes(options.qwen3 or "")
            each = 3 * sizes.intermediate_size + 4 * sizes.hidden_size
            captions = self.text_batch * self.batch.words * each * (2 if half else 4)
            qwen = Item("qwen3", stored_bytes(options.qwen3) * (1 if half else 2), "text encoder")
            maps = Item("maps", captions, "captions in it")
            found.append(Phase("encoding captions", (qwen, maps)))
        return found

    def _maps(self, options: TrainOptions, units: float, pixels: int) -> int:
        """Bytes of the VAE's maps for so many pixels; strips have the width of a square picture."""
        rows = options.vae_chunk_size
        if rows is not None:
            pixels = min(pixels, int(STRIPS * rows * pixels**0.5))
        vae = self.models.vae
        return int(units * vae.config.width * pixels * next(vae.parameters()).dtype.itemsize)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _states(encoder: TextEncoder, ids: Tensor) -> Tensor:
    """The encoder's states [B, N, C] on the meta device, where it could not look at a mask."""
    masks: dict[str, None] = {"full_attention": None}
    found = encoder.model(input_ids=ids, attention_mask=masks, use_cache=False)
    return found.last_hidden_state


@cache
def _published() -> tuple[int, int]:
    """Bytes of the published DiT in 16 bit, and numbers of adapters on it for each rank."""
    with torch.device("meta"):
        dit = AnimaDiT(PUBLISHED).bfloat16()
    layers = [target.linear for target in find_targets(dit, None, None)]
    return bytes_of(dit), sum(layer.in_features + layer.out_features for layer in layers)


def published_step(policy: str, *, tokens: int, batch: int = 1, rank: int = 32) -> Prediction:
    """A step of the published 2B DiT in fused blocks, the captions cached.

    Args:
        policy: none, mlp or block, for all blocks.
        tokens, batch: L and B.
        rank: of float32 adapters on the ten default layers of every block, with plain AdamW.
    """
    weights, numbers = _published()
    numbers *= rank
    unit = batch * tokens * PUBLISHED.model_channels * 2
    adapters = (
        Item("parameters", 4 * numbers, "adapters"),
        Item("gradients", 4 * numbers, "gradients of the adapters"),
        Item("state", 8 * numbers, "optimizer state"),
    )
    blocks = [fused_block(policy, unit)] * PUBLISHED.num_blocks
    return Prediction((Phase("training", training_items(weights, adapters, blocks, unit)),), 0)
