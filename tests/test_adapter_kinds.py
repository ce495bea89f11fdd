"""Every kind of adapter that is declared can be trained, written, recognised, and is documented."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished import write_network

from anima_fast.adapters.deltas import DELTAS
from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.layers import Dropouts
from anima_fast.adapters.lora import LAYERS
from anima_fast.adapters.targets import Target
from anima_fast.inspection.file import inspect_file
from anima_fast.models.adapter_kinds import ADAPTER_KINDS, DORA, LYCORIS, kind_of
from anima_fast.models.checkpoint import Checkpoint, detect_kind
from anima_fast.options.network_args import parse_network_args

DOCS = Path(__file__).parent.parent / "docs"


def test_a_kind_has_its_classes():
    assert list(DELTAS) == list(LAYERS) == list(ADAPTER_KINDS)


@pytest.mark.parametrize("kind", ADAPTER_KINDS, ids=lambda kind: kind.word)
@pytest.mark.parametrize("dora", [None, "outputs"])
def test_a_kind_is_trained_written_and_recognised(tmp_path, kind, dora):
    path = write_network(tmp_path / "a.safetensors", kind=kind.word, dora=dora)
    assert detect_kind(Checkpoint.open(path)) == "lora"
    for delta in read_lora(path)[0].values():
        assert isinstance(delta, DELTAS[kind]) and kind_of(delta.tensors()) is kind
        assert kind.is_complete(delta.matrices())
        assert not any(kind.is_complete(delta.matrices().keys() - {m}) for m in delta.matrices())
    title, module = (DORA, LYCORIS) if dora else (kind.title, kind.module)
    found = inspect_file(path)
    assert found["title"] == f"{title} for Anima"
    assert module in found["programs"]["sd-scripts"] or title == "LoRA"


@pytest.mark.parametrize("kind", ADAPTER_KINDS, ids=lambda kind: kind.word)
def test_a_kind_can_be_asked_for_and_is_documented(kind):
    assert parse_network_args([], kind.module).kind == kind.word
    for name in kind.algorithms:
        assert parse_network_args([f"algo={name}"], LYCORIS).kind == kind.word
    for page in ("options.md", "methods.md", "lora-files.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        assert kind.title in text and (page != "options.md" or kind.module in text), page


@pytest.mark.parametrize("kind", ADAPTER_KINDS, ids=lambda kind: kind.word)
def test_a_kind_trains_what_its_file_holds(kind):
    """The live layer, its gradients, its rows and its factors are those of Δ as one matrix."""
    generator, shape = torch.Generator().manual_seed(0), (30, 42)
    fresh = LAYERS[kind].initial(shape, 3, generator)
    assert not fresh.matrix().any() and fresh.shape == shape
    delta = fresh.map(lambda t: torch.randn(t.shape, generator=generator))
    delta = replace(delta, alpha=torch.tensor(2.0))
    layer = LAYERS[kind](Target("dit", "layer", torch.nn.Linear(42, 30)), delta, Dropouts())
    # Tolerances are those of float32 sums of numbers of this size.
    near = {"rtol": 1e-4, "atol": 1e-3}

    x = torch.randn(5, 42, generator=generator).requires_grad_()
    y = layer.delta(x, 0.7)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    expected = 0.7 * x @ replace(delta, **leaves).matrix().T
    torch.testing.assert_close(y, expected, **near)
    dy = torch.randn(5, 30, generator=generator)
    found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    wanted = torch.autograd.grad(expected, [x, *leaves.values()], dy)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, **near)

    torch.testing.assert_close(layer.rows(7, 19), delta.matrix()[7:19], **near)
    left, right = delta.factors()
    torch.testing.assert_close(left @ right, delta.product(), **near)
    torch.testing.assert_close(delta.times(2).product(), 2 * delta.product(), **near)
    assert set(LAYERS[kind].plus) <= delta.fields().keys()
