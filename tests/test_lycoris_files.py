"""Whole files against the lycoris-lora package: its names, its choice of layers, its output."""

import pytest
import torch
from lycoris import kohya
from tiny_dit import make_dit, make_inputs, relative_error

from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.lora import add_lora, merge_lora

NETWORKS = [
    ("lora", {}),
    ("loha", {}),
    ("lokr", {"factor": 4}),
    ("lokr", {"full_matrix": True}),
    ("lokr", {"decompose_both": True, "factor": 8}),
]


def fill(network):
    """Random values in every matrix, magnitudes a little off those of the weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("dora_scale"):
                parameter.mul_(1.1)
            else:
                parameter.normal_(std=0.1, generator=generator)
    return network.eval()


@pytest.mark.parametrize("magnitudes", [None, "outputs", "inputs"])
@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_a_file_of_lycoris_means_the_same_here(tmp_path, kind, options, magnitudes):
    dit, inputs = make_dit(), make_inputs()
    dora = {"dora_wd": bool(magnitudes), "wd_on_output": magnitudes != "inputs"}
    theirs = kohya.create_network(
        1.0, 3, 2.0, None, None, dit, algo=kind, preset="full", **dora, **options
    )
    theirs.apply_to(None, dit, apply_text_encoder=False, apply_unet=True)
    fill(theirs)
    expected = dit(*inputs).detach()
    path = tmp_path / "theirs.safetensors"
    theirs.save_weights(path, torch.float32, {})
    live, merged = make_dit(), make_dit()
    add_lora(live, modules_from=read_lora(path)[0]).eval()
    merge_lora(merged, path)
    for model in (live, merged):
        assert relative_error(model(*inputs).detach(), expected) < 1e-5


# The package reads magnitudes of the outputs only, whatever it writes.
@pytest.mark.parametrize("magnitudes", [None, "outputs"])
@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_a_file_from_here_means_the_same_in_lycoris(tmp_path, kind, options, magnitudes):
    dit, inputs = make_dit(), make_inputs()
    ours = add_lora(
        dit, kind=kind, rank=3, alpha=2.0, seed=1, dora=magnitudes, include_patterns=[".*"],
        lokr=options,
    )  # fmt: skip
    fill(ours)
    expected = dit(*inputs).detach()
    path = tmp_path / "ours.safetensors"
    ours.save(path)
    other = make_dit()
    theirs, _ = kohya.create_network_from_weights(1.0, path, None, None, other)
    theirs.apply_to(None, other, apply_text_encoder=False, apply_unet=True)
    theirs.eval()
    assert len(theirs.unet_loras) == len(ours.adapters)
    assert relative_error(other(*inputs).detach(), expected) < 1e-5
