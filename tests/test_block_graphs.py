"""CUDA graphs of the fused blocks, with PyTorch's recorder replaced by one for the CPU.

The stand-in traces forward and backward once, down to the operators, and then repeats the trace
with what lies in its input buffers: whatever a host number or a branch decided stays as it was, as
in a real graph, and a value that the host reads breaks the recording off.
"""

import pytest
import torch
from test_block import TWO, make_network
from tiny_dit import dit_weights
from torch.fx.experimental.proxy_tensor import make_fx

from anima_fast.errors import UserError
from anima_fast.memory.offload import SaverSettings, graphs_of, install_block_runner
from anima_fast.models import block_graphs, fuse
from anima_fast.models.dit import load_dit


class Recorder:
    """`torch.cuda.make_graphed_callables` for the CPU."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, stack, sample_args, allow_unused_input, pool):
        self.recordings += 1
        parameters = tuple(stack.parameters())
        inputs = (*sample_args, *parameters)
        wanted = [t for t in inputs if t.requires_grad]

        def both(args, dout):
            out = stack(*args)
            grads = torch.autograd.grad(out, wanted, dout, allow_unused=allow_unused_input)
            return out.detach(), grads

        trace = make_fx(both)(sample_args, torch.zeros_like(stack(*sample_args)))
        zeros = torch.zeros_like(stack(*sample_args))

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *values):
                with torch.no_grad():
                    for own, value in zip(sample_args, values, strict=False):
                        own.copy_(value)
                return trace(sample_args, zeros)[0]

            @staticmethod
            def backward(ctx, dout):
                # What a second forward had put into the buffers would be seen here.
                grads = iter(trace(sample_args, dout)[1])
                return tuple(next(grads) if t.requires_grad else None for t in inputs)

        return lambda *args: Graphed.apply(*args, *parameters)


@pytest.fixture
def recorder():
    # What was said once in another test should be said again.
    fuse.say_once.cache_clear()
    return Recorder()


def make_dit(recorder=None, dtype=torch.float32, recompute="none", **options):
    dit = load_dit(dit_weights(TWO), dtype=dtype)
    network = make_network(dit, **options)
    settings = SaverSettings(recompute, cuda_graphs=recorder is not None)
    install_block_runner(dit, settings, fused=True)
    if recorder is not None:
        dit.graphs.capture = recorder
    return dit, network


def batch_of(seed, height=6, width=10, rows=5, batch=2):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    size = (batch, TWO.in_channels, height, width)
    return draw(*size), torch.rand(batch, generator=g), draw(batch, rows, TWO.context_dim)


def loss_of(dit, latents, sigma, context, zero_keys):
    context = context.to(dit.dtype)
    return dit(latents.to(dit.dtype), sigma, context, zero_keys=zero_keys).float().square().mean()


def gradients(network):
    found = {
        f"{name}.{kind}": parameter.grad.clone()
        for name, adapter in network.modules_by_name.items()
        for kind, parameter in adapter.named_parameters()
        if parameter.grad is not None
    }
    network.zero_grad_flat()
    return found


def step(dit, network, batch, zero_keys):
    loss = loss_of(dit, *batch, zero_keys)
    loss.backward()
    return {"loss": loss.detach(), **gradients(network)}


def zero_keys_of(rows):
    """One count for each sample of a batch with this many text rows."""
    return [512 - rows, 600 - rows]


@pytest.mark.parametrize(
    "recompute, modules", [("none", "blocks"), ("none", "all"), ("mlp", "all"), (1, "blocks")]
)
def test_replays_agree_with_plain_steps(recorder, recompute, modules):
    options = {"include_patterns": [".*"]} if modules == "all" else {}
    graphed, plain = (make_dit(r, recompute=recompute, **options) for r in (recorder, None))
    # Other noise, images, captions of other lengths, images of the same area but another shape.
    for seed, rows, size in [(1, 5, (6, 10)), (2, 9, (6, 10)), (3, 2, (10, 6)), (4, 64, (6, 10)),
                             (5, 65, (6, 10)), (6, 70, (6, 10)), (7, 5, (4, 4))]:  # fmt: skip
        batch = batch_of(seed, *size, rows=rows)
        found, expected = (step(*one, batch, zero_keys_of(rows)) for one in (graphed, plain))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-6)
        with torch.no_grad():
            for network in (graphed[1], plain[1]):
                network.flat.add_(0.01)
    # Up to 64 rows, and up to 128: recorded when they came for the second time.
    assert recorder.recordings == 2 and graphed[0].graphs.replayed == 4


def test_text_gets_its_gradient(recorder):
    graphed, plain = make_dit(recorder), make_dit()
    for seed in range(3):
        latents, sigma, context = batch_of(seed)
        found = []
        for dit, _ in (graphed, plain):
            text = context.clone().requires_grad_()
            loss_of(dit, latents, sigma, text, zero_keys_of(5)).backward()
            found.append(text.grad)
        torch.testing.assert_close(*found, rtol=2e-4, atol=1e-7)
    assert graphed[0].graphs.replayed == 2


def test_strength_is_part_of_the_key(recorder):
    graphed, plain = make_dit(recorder), make_dit()
    for strength in (1.0, 1.0, 0.3, 0.3, 1.0):
        losses = []
        for dit, network in (graphed, plain):
            network.multiplier = strength
            losses.append(step(dit, network, batch_of(1), zero_keys_of(5))["loss"])
        torch.testing.assert_close(*losses)
    assert recorder.recordings == 2 and graphed[0].graphs.replayed == 3


def test_weights_that_moved_are_recorded_anew(recorder):
    dit, network = make_dit(recorder)
    plain = make_dit()
    for moves in (False, False, True, False):
        if moves:
            for one in (dit, plain[0]):
                weight = one.blocks[1].mlp.layer2.weight
                weight.data = weight.data * 2
        found, expected = (step(*one, batch_of(1), None) for one in ((dit, network), plain))
        torch.testing.assert_close(found["loss"], expected["loss"])
    assert recorder.recordings == 2


def test_two_forwards_before_a_backward(recorder):
    graphed, plain = make_dit(recorder), make_dit()
    found = []
    for dit, network in (graphed, plain):
        step(dit, network, batch_of(1), zero_keys_of(5))
        first = loss_of(dit, *batch_of(2), zero_keys_of(5))
        second = loss_of(dit, *batch_of(3), zero_keys_of(5))
        (first + second).backward()
        found.append(gradients(network))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=2e-4, atol=1e-6)
    assert graphed[0].graphs.replayed == 1
    # The buffers are free again once the autograd graph is gone.
    del first, second
    step(*graphed, batch_of(4), zero_keys_of(5))
    assert graphed[0].graphs.replayed == 2


@pytest.mark.parametrize(
    "options, zero_keys, said",
    [
        ({"dropout": 0.5}, None, "dropout"),
        ({"rank_dropout": 0.5}, None, "dropout"),
        ({"module_dropout": 0.5}, None, "dropout"),
        ({}, [507, -2], "above 512"),
    ],
)
def test_what_cannot_be_recorded_runs_plainly(recorder, caplog, options, zero_keys, said):
    graphed, plain = make_dit(recorder, **options), make_dit(**options)
    for seed in range(3):
        found = []
        for dit, network in (graphed, plain):
            network.train()
            torch.manual_seed(seed)
            batch = batch_of(seed)
            batch[2][1, -2:] = 0
            found.append(step(dit, network, batch, zero_keys))
        assert found[0].keys() == found[1].keys()
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0)
    assert recorder.recordings == 0
    assert sum("CUDA graphs are off" in line and said in line for line in caplog.messages) == 1


@pytest.mark.parametrize("always", [True, False])
def test_training_outside_the_blocks_runs_plainly(recorder, always):
    """There a recording would have no gradient to be compared by."""
    options = {"include_patterns": [".*final_layer.*"], "exclude_patterns": [".*"]}
    graphed, plain = make_dit(recorder, **options), make_dit(**options)
    graphed[0].graphs.always, graphed[0].graphs.timed = always, Timed(True)
    for seed in range(5):
        found, expected = (step(*one, batch_of(seed), None) for one in (graphed, plain))
        assert len(found) > 1 and found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value)
    assert recorder.recordings == 0


def test_evaluation_runs_plainly(recorder):
    dit, _ = make_dit(recorder)
    with torch.no_grad():
        for _ in range(3):
            loss_of(dit, *batch_of(1), None)
    assert recorder.recordings == 0


def test_a_failed_recording_is_said_and_training_goes_on(recorder, caplog):
    graphed, plain = make_dit(recorder), make_dit()

    def fails(*args, **kwargs):
        recorder.recordings += 1
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    graphed[0].graphs.capture = fails
    for seed in range(4):
        found, expected = (step(*one, batch_of(seed), None) for one in (graphed, plain))
        assert torch.equal(found["loss"], expected["loss"])
    assert recorder.recordings == 1
    assert [line for line in caplog.messages if "recording failed: CUDA error" in line]


class Timed:
    """`block_graphs.TimedForward` that answers what a test says."""

    def __init__(self, *answers):
        self.answers, self.timed = list(answers), 0

    def __call__(self):
        return self

    def __enter__(self):
        self.timed += 1

    def __exit__(self, *_):
        pass

    def pays(self):
        return self.answers.pop(0)


@pytest.mark.parametrize(
    "answers, timed, replayed", [([True], 1, 5), ([False, True], 2, 4), ([False] * 3, 3, 0)]
)
def test_unasked_only_what_pays_is_recorded(recorder, caplog, answers, timed, replayed):
    """The first step compiles, the next are timed until one says that a graph pays."""
    graphed, plain = make_dit(recorder), make_dit()
    graphed[0].graphs.always, graphed[0].graphs.timed = False, Timed(*answers)
    for seed in range(8):
        found, expected = (step(*one, batch_of(seed), None) for one in (graphed, plain))
        torch.testing.assert_close(found["loss"], expected["loss"])
    assert graphed[0].graphs.timed.timed == timed
    assert graphed[0].graphs.replayed == replayed
    assert not caplog.messages


def test_unasked_nothing_is_said_of_what_cannot_be_recorded(recorder, caplog):
    dit, network = make_dit(recorder, dropout=0.5)
    dit.graphs.always, dit.graphs.timed = False, Timed(True)
    network.train()
    for seed in range(4):
        step(dit, network, batch_of(seed), None)
    assert recorder.recordings == 0 and not caplog.messages


@pytest.mark.parametrize("wrong", ["result", "gradient", "nothing"])
def test_a_recording_that_went_wrong_is_not_used(recorder, caplog, wrong):
    """A value that stayed what it was at the recording, or a gradient that is left out."""
    graphed, plain = make_dit(recorder), make_dit()

    def capture(stack, sample_args, **options):
        forward = stack.forward
        frozen = forward(*sample_args).detach()

        def run(*args):
            out = forward(*args)
            if wrong == "result":
                return out + (frozen - out).detach()
            return out.detach() + 0 * out if wrong == "gradient" else out

        return run

    graphed[0].graphs.capture = capture
    for seed in range(4):
        found, expected = (step(*one, batch_of(seed), None) for one in (graphed, plain))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-6)
    graphs = graphed[0].graphs
    if wrong == "nothing":
        assert graphs.replayed == 3 and not caplog.messages
    else:
        assert graphs.replayed == 0 and not graphs
        assert [line for line in caplog.messages if "off the plain one" in line]


@pytest.mark.parametrize(
    "host, card, kept, free, pays",
    [(0.1, 0.11, 4, 9, True), (0.1, 0.2, 4, 9, False), (0.1, 0.05, 4, 9, True),
     (0.1, 0.11, 5, 9, False), (0.1, 0.11, 5, 10, True)],
)  # fmt: skip
def test_a_graph_pays_where_the_card_waits_and_has_room(monkeypatch, host, card, kept, free, pays):
    """Host and card in seconds; kept and free in bytes, 2 of the free ones cached by PyTorch."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * card

    clock, allocated = iter((7.0, 7.0 + host)), iter((100, 100 + kept, 100))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 102)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free - 2, 1000))
    monkeypatch.setattr(block_graphs.time, "perf_counter", lambda: next(clock))
    launches = block_graphs.TimedForward()
    with launches:
        pass
    assert launches.pays() == pays


@pytest.mark.parametrize(
    "cuda_graphs, device, moves, always",
    [(None, "cuda", 0, False), (None, "cuda", 3, None), (None, "cpu", 0, None),
     (True, "cpu", 0, True), (False, "cuda", 0, None)],
)  # fmt: skip
def test_on_a_card_graphs_are_there_without_asking(cuda_graphs, device, moves, always):
    graphs = graphs_of(cuda_graphs, torch.device(device), moves=moves)
    assert (graphs if graphs is None else graphs.always) == always


def test_no_more_graphs_than_allowed(recorder, monkeypatch):
    monkeypatch.setattr(block_graphs, "MOST", 1)
    dit, network = make_dit(recorder)
    for height in (4, 4, 6, 6, 8, 8, 4):
        step(dit, network, batch_of(1, height, 4), None)
    assert recorder.recordings == 1 and dit.graphs.replayed == 2


@pytest.mark.parametrize(
    "options, fused", [({}, False), ({"blocks_to_swap": 1}, True), ({"offload": "host"}, True)]
)
def test_refused_with_what_moves_or_is_eager(options, fused):
    dit = load_dit(dit_weights(TWO), dtype=torch.float32)
    with pytest.raises(UserError, match="--cuda_graphs needs the fused blocks"):
        install_block_runner(dit, SaverSettings(cuda_graphs=True, **options), fused=fused)
