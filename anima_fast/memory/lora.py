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
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from anima_fast.adapters.targets import find_targets
from anima_fast.memory.kept import BlockCount, Storages, kept, size, storages
from anima_fast.memory.offload import choose_policies
from anima_fast.memory.plan import (
    WORKSPACE_UNITS,
    Asks,
    Item,
    LargestBatch,
    Phase,
    Prediction,
    program_bytes,
    stored_bytes,
)
from anima_fast.memory.swap import swapped_indices
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.dit_config import PUBLISHED, TEXT_ROWS
from anima_fast.models.text_encoder import read_sizes

if TYPE_CHECKING:
    from anima_fast.adapters.network import LoRANetwork
    from anima_fast.memory.plan import Modes, Options
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


@dataclass(frozen=True)
class BlockBytes:
    """Of one block: what it keeps for backward, and what backward recomputes on top of that."""

    kept: float
    again: float = 0.0


def fused_block(policy: str, unit: float, *, more: float = 0.0, wide: bool = False) -> BlockBytes:
    """A fused block under a policy.

    Args:
        policy: none, mlp or block.
        unit: bytes of one [B, L, D] tensor of the compute dtype.
        more: units kept besides, unless the policy is `block`.
        wide: the residual stream, which `block` keeps once and the others three times, has twice
            the bytes of the compute dtype.
    """
    whole = SAVED_UNITS["none"] + more + 3 * wide
    kept = SAVED_UNITS[policy] + (wide if policy == "block" else more + 3 * wide)
    return BlockBytes(kept * unit, (whole - kept) * unit)


def training_items(
    weights: int,
    adapters: Sequence[Item],
    blocks: Sequence[BlockBytes],
    unit: float,
    *,
    around: int = 0,
) -> tuple[Item, ...]:
    """What is on the device in the backward pass.

    Args:
        weights: bytes of the frozen DiT there.
        adapters: the network and all that belongs to it.
        blocks: of all blocks.
        unit: bytes of one [B, L, D] tensor.
        around: bytes kept by other layers than the blocks'.
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
class LoRANeeds:
    """The prediction for any options, with the same network and data on the same device.

    Attributes:
        batch, device: of the run.
        models: see `Models`.
        asks: see `Asks`.
        fused: whether the run takes the fused blocks, as far as options and device decide.
        text_batch: captions that are encoded together.
        preview: pixels of the largest preview; 0 without previews.
    """

    batch: LargestBatch
    device: torch.device
    models: Models
    asks: Asks
    fused: bool
    text_batch: int = 1
    preview: int = 0
    subject: str = "this LoRA"
    remedies: tuple[dict, ...] = REMEDIES
    # `block` is what is left of `mlp`.
    together: tuple[dict, ...] = tuple(r for r in REMEDIES if r.get("recompute") != "mlp")
    last_resort: str = "use a smaller resolution or batch size"

    @property
    def blocks(self) -> int:
        """Of the DiT."""
        return len(self.models.dit.blocks)

    def __call__(self, options: Options) -> Prediction:
        """The predicted peaks."""
        run = cast("TrainOptions", options)
        modes = self.asks.modes(run)
        staying = self.staying(run, modes)
        training = training_items(
            self.weights(run), self.adapters(run), self.block_bytes(run), self.unit,
            around=self.around(run),
        )  # fmt: skip
        phases = [*self.encoding(run, modes)]
        if modes.image == "live":
            encode = Item("encode", self.vae_maps(run, self.batch.images), "encoding of the batch")
            kept = [item for item in training if item.key not in ("activations", "workspace")]
            phases.append(Phase("training", (*kept, *staying, encode)))
        phases.append(Phase("training", (*training, *self.graphs(run, training), *staying)))
        if self.preview:
            phases.append(self.previews(run, modes, training, staying))
        return Prediction(tuple(phases), self.host(run), ASSUMED)

    def allows(self, before: Options, after: Options) -> bool:
        """Whether the same is trained."""
        old, new = cast("TrainOptions", before), cast("TrainOptions", after)
        return old.trains_text_encoder == new.trains_text_encoder

    # Weights and what belongs to the network

    def swapped(self, options: TrainOptions) -> list[int]:
        """Bytes of each swapped block in host memory."""
        blocks = self.models.dit.blocks
        # Fused blocks compute the modulation of all blocks at once, so those weights stay.
        keep = "adaln_modulation" if self.runs_fused else None
        return [
            sum(p.nbytes for n, p in blocks[i].named_parameters() if not (keep and keep in n))
            for i in swapped_indices(len(blocks), options.blocks_to_swap or 0)
        ]

    def weights(self, options: TrainOptions) -> int:
        """Of the frozen DiT on the device; of swapped blocks, two visit it."""
        swapped = self.swapped(options)
        return bytes_of(self.models.dit) - sum(swapped) + sum(sorted(swapped)[-2:])

    def adapters(self, options: TrainOptions) -> tuple[Item, ...]:
        """The network, its gradients, the optimizer's state and the running mean."""
        network = self.models.network
        mean = 4 * network.flat.numel() if options.ema_decay is not None else 0
        return (
            Item("parameters", network.flat.nbytes, "adapters"),
            Item("gradients", network.flat_grad.nbytes, "gradients of the adapters"),
            Item("state", int(self.asks.state_bytes(options)), "optimizer state"),
            Item("mean", mean, "running mean of the adapters"),
        )

    # Activations

    @property
    def unit(self) -> int:
        """Bytes of one [B, L, D] tensor of the compute dtype."""
        dit, batch = self.models.dit, self.batch
        width = dit.config.model_channels * dit.dtype.itemsize
        return batch.images * batch.tokens * width

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

    def block_bytes(self, options: TrainOptions) -> list[BlockBytes]:
        """Of every block."""
        policies = choose_policies(
            self.blocks,
            fused=self.fused,
            recompute=options.recompute,
            gradient_checkpointing=options.gradient_checkpointing,
            cpu_offload=options.cpu_offload_checkpointing,
            unsloth_offload=options.unsloth_offload_checkpointing,
            blocks_to_swap=options.blocks_to_swap or 0,
            cuda_graphs=options.cuda_graphs,
        )
        swapped = swapped_indices(self.blocks, options.blocks_to_swap or 0)
        policies = ["block" if i in swapped else policy for i, policy in enumerate(policies)]
        if options.cpu_offload_checkpointing or options.unsloth_offload_checkpointing:
            policies = ["host"] * self.blocks
        first = 0 if self.trains_text else self._first_adapted
        found = [BlockBytes(0.0)] * first
        return found + [self._block(options, policies[i], i) for i in range(first, self.blocks)]

    def _block(self, options: TrainOptions, policy: str, index: int) -> BlockBytes:
        if self.runs_fused:
            more, wide = self._more_units(options), self.input_bytes > self.unit
            if policy != "host":
                return fused_block(policy, self.unit, more=more, wide=wide)
            whole = fused_block("none", self.unit, more=more, wide=wide).kept
        else:
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

    @property
    def input_bytes(self) -> int:
        """Of what a recomputed block keeps; between blocks float16 is too narrow."""
        return self.unit * (2 if self.models.dit.dtype == torch.float16 else 1)

    def around(self, options: TrainOptions) -> int:
        """Kept by the layers around eager blocks and by a trained text path."""
        return (0 if self.runs_fused else self.eager.around) + self.text_kept

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

    def graphs(self, options: TrainOptions, training: Sequence[Item]) -> tuple[Item, ...]:
        """Where graphs are asked for: the largest holds what a step needs besides weights."""
        if not (options.cuda_graphs and self.runs_fused):
            return ()
        held = sum(i.size for i in training if i.key in ("activations", "workspace"))
        return (Item("graphs", held, "CUDA graphs"),)

    # Other models and phases

    def staying(self, options: TrainOptions, modes: Modes) -> tuple[Item, ...]:
        """Models besides the DiT that stay in training."""
        found = bytes_of(self.models.vae) if modes.image == "live" else 0
        if modes.text != "context":
            kept = (self.models.adapter, self.models.text_encoder)
            found += sum(bytes_of(model) for model in kept if model is not None)
        return (Item("other", found, "other models"),)

    def encoding(self, options: TrainOptions, modes: Modes) -> list[Phase]:
        """The phases before the DiT is loaded."""
        found = []
        if modes.image == "cached":
            maps = self.vae_maps(options, options.vae_batch_size)
            vae = Item("vae", bytes_of(self.models.vae), "VAE")
            found.append(Phase("encoding images", (vae, Item("maps", maps, "images in the VAE"))))
        if modes.text != "live":
            half = options.mixed_precision != "no"
            encoder = stored_bytes(options.qwen3) * (1 if half else 2)
            qwen = read_sizes(options.qwen3 or "")
            each = 3 * qwen.intermediate_size + 4 * qwen.hidden_size
            maps = self.text_batch * self.batch.words * each * (2 if half else 4)
            found.append(
                Phase(
                    "encoding captions",
                    (Item("qwen3", encoder, "text encoder"), Item("maps", maps, "captions in it")),
                )
            )
        return found

    def vae_maps(self, options: TrainOptions, images: int) -> int:
        """Maps of the VAE while it encodes the largest images."""
        return self._maps(options, ENCODE_UNITS, images * self.batch.pixels)

    def _maps(self, options: TrainOptions, units: float, pixels: int) -> int:
        rows = options.vae_chunk_size
        if rows is not None:
            # A square picture: strips have its width.
            pixels = min(pixels, int(STRIPS * rows * pixels**0.5))
        vae = self.models.vae
        itemsize = next(vae.parameters()).dtype.itemsize
        return int(units * vae.config.width * pixels * itemsize)

    def previews(
        self,
        options: TrainOptions,
        modes: Modes,
        training: Sequence[Item],
        staying: Sequence[Item],
    ) -> Phase:
        """The VAE decodes a preview while the DiT and all of the network stay."""
        kept = [item for item in training if item.key not in ("activations", "workspace")]
        vae = 0 if modes.image == "live" else bytes_of(self.models.vae)
        maps = self._maps(options, DECODE_UNITS, self.preview)
        more = (Item("vae", vae, "VAE"), Item("maps", maps, "preview in the VAE"))
        return Phase("previews", (*kept, *staying, *more))

    def host(self, options: TrainOptions) -> int:
        """The program, swapped blocks and offloaded inputs."""
        offloads = options.cpu_offload_checkpointing or options.unsloth_offload_checkpointing
        inputs = self.blocks * self.input_bytes if offloads else 0
        return program_bytes(self.device) + sum(self.swapped(options)) + inputs


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
