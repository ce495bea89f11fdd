"""The transformer of diffusers with the sizes of one of ours: an independent judge."""

import pytest

diffusers = pytest.importorskip("diffusers")


def make_transformer(config):
    """Random weights, in eval mode."""
    return diffusers.CosmosTransformer3DModel(
        # The padding mask goes in as the 17th channel: its own way to it needs torchvision.
        in_channels=17,
        out_channels=16,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.num_blocks,
        mlp_ratio=config.mlp_hidden / config.model_channels,
        text_embed_dim=config.context_dim,
        adaln_lora_dim=config.adaln_rank,
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    ).eval()
