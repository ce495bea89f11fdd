"""Options of memory and speed change how a run computes, and not what."""

import pytest
from full_stack import full_options, make_full_world
from stack import assert_close_files, make_world, train_options

from anima_fast.training.loop import train

KINDS = {"lora": (make_world, train_options), "full": (make_full_world, full_options)}
BOTH = (
    {"gradient_checkpointing": True},
    {"cpu_offload_checkpointing": True},
    {"unsloth_offload_checkpointing": True},
    {"split_attn": True},
    {"cache_latents": False},
)
ONE = {
    "lora": (
        {"cpu_offload_checkpointing": True, "gradient_checkpointing": True},
        {"cache_latents": False, "cache_latents_to_disk": True},
        {"cache_text_encoder_outputs": False, "cache_text_encoder_outputs_to_disk": True},
        {"cache_text_encoder_outputs": False, "network_train_unet_only": True},
        {"kernels": "triton"},
        {"kernels": "triton", "recompute": "mlp"},
        {"kernels": "triton", "recompute": "1"},
    ),
    "full": ({"recompute": "2"},),
}
CASES = [(kind, changes) for kind in KINDS for changes in (*BOTH, *ONE[kind])]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The models and data of a kind of training, and the file of a plain run on them."""
    made = {}

    def of(kind):
        if kind not in made:
            make, options = KINDS[kind]
            folder = tmp_path_factory.mktemp(kind)
            world = make(folder / "world")
            made[kind] = world, train(options(world, folder / "plain")).output
        return made[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "changes"), CASES, ids=[f"{kind} {'+'.join(changes)}" for kind, changes in CASES]
)
def test_memory_options_do_not_change_the_result(plain, tmp_path, kind, changes):
    world, expected = plain(kind)
    result = train(KINDS[kind][1](world, tmp_path, **changes))
    assert_close_files(result.output, expected)
