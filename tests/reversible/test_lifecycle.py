"""Sequences over their life: runs that repeat, mistakes that pass, copies, counters, and one inside another."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from revnet import AdditiveCoupling, ReversibleSequence, is_recomputing
from revnet.models import revnet38
from revnet.profiling import MemoryTimeline
from tests.reversible.networks import BRANCHES, EVERY, EXACT, MODES, VALUES, blocks, same, sequence, step


@pytest.fixture
def x():
    return torch.randn(3, 8, 4, 4, dtype=torch.float64)


def trained(activations, exact, device, autocast=None, scaler=None, steps=3):
    """Parameters and buffers after a few steps of a network with dropout."""
    torch.manual_seed(2)
    net = sequence(activations, 6, 8, BRANCHES["dropout"], torch.float32, exact=exact).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=autocast is torch.float16)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, autocast, enabled=autocast is not None):
            y = net(torch.randn(4, 16, 8, 8).to(device))
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    return [*net.state_dict().values(), torch.tensor(scaler.get_scale())]


@MODES
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_are_bit_equal_under_deterministic_algorithms(activations, exact, device, autocast):
    first, second = (trained(activations, exact, device, autocast) for _ in range(2))
    assert all(map(torch.equal, first, second))
    if exact:
        assert all(map(torch.equal, first, trained("store", exact, device, autocast)))


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("activations", VALUES[1:])
def test_training_in_float16_with_a_gradient_scaler_is_that_of_store(activations):
    found, truth = (trained(value, True, "cuda", torch.float16, steps=10) for value in (activations, "store"))
    assert all(map(torch.equal, found, truth))


@MODES
def test_50_steps_leave_no_more_memory_alive_than_one(activations, exact):
    net, x = sequence(activations, 2, 2, BRANCHES["dropout"], exact=exact), torch.randn(2, 4, 4, 4).double()
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        with MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
            live = []
            for _ in range(50):
                net.zero_grad()
                net(x).sum().backward()
                live.append(timeline.live())
    finally:
        gc.enable()
    assert len(set(live[1:])) == 1


def test_a_layer_that_was_replaced_is_not_kept():
    net = sequence("reconstruct", 3, 4)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    step(net, x)
    replaced = weakref.ref(net[2])
    net[2] = blocks(1, 4)[0]
    step(net, x)
    gc.collect()
    assert replaced() is None


@EXACT
@pytest.mark.parametrize("keep", [False, True])
def test_a_loss_that_is_kept_keeps_nothing_of_its_backward_pass(exact, keep, x):
    net = sequence("reconstruct", branch=BRANCHES["dropout"], exact=exact)
    y = net(x)
    node = y.grad_fn
    while not hasattr(node, "sample"):
        node = node.next_functions[0][0]
    loss = y.sum()
    loss.backward(retain_graph=keep)
    assert (node.sample is not None) == (node.evaluations is not None) == keep
    if not keep:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@MODES
def test_a_dropped_output_frees_its_graph_at_once(activations, exact, x):
    net = sequence(activations, exact=exact)
    gc.disable()
    try:
        with MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
            y = net(x)
            node = weakref.ref(y.grad_fn)
            kept = timeline.live()
            del y
            assert node() is None
            assert timeline.live() == 0 < kept
    finally:
        gc.enable()


class FailsOnce(nn.Module):
    """Raises in its first evaluation inside a backward pass, after the branch proper has run."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.failed = False

    def forward(self, x):
        y = self.inner(x)
        if is_recomputing() and not self.failed:
            self.failed = True
            raise ArithmeticError("planned")
        return y


@MODES
def test_an_exception_in_the_middle_of_a_backward_pass_leaves_the_next_step_right(activations, exact, x):
    net, truth = (sequence(value, branch=BRANCHES["dropout"], exact=exact) for value in (activations, "store"))
    net[2].f = FailsOnce(net[2].f)
    with pytest.raises(ArithmeticError, match="planned"):
        step(net, x)
    assert not is_recomputing()
    torch.manual_seed(5)
    truth(x)  # the forward pass of the step that failed counts in the statistics
    y, expected = step(truth, x)
    z, found = step(net, x)
    assert torch.equal(y, z)
    assert same(found, expected, exact)
    assert all(map(torch.equal, net.buffers(), truth.buffers()))


# A block that is recomputed is evaluated again up to the last of its four convolutions.
STEPS = {"recompute": (3 + 3 / 4) / 3, "reconstruct": (3 + 1) / 3}


@MODES
def test_flop_counter_finds_the_second_forward_pass(activations, exact):
    def flops(value):
        net = ReversibleSequence(blocks(4, 4), value, exact)
        halves = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            y1, y2 = net(*halves)
            (y1 + y2).sum().backward()
        return counter.get_total_flops()

    assert flops(activations) == STEPS[activations] * flops("store") > 0


@MODES
def test_flop_counter_works_over_a_whole_network(activations, exact):
    def flops(value):
        with FlopCounterMode(display=False) as counter:
            revnet38(activations=value, exact=exact)(torch.randn(2, 3, 32, 32)).sum().backward()
        return counter.get_total_flops()

    # Where blocks are reconstructed, stem and transitions are recomputed, up to their last convolutions.
    expected = {"recompute": STEPS["recompute"], "reconstruct": 1.3166}[activations]
    assert flops(activations) / flops("store") == pytest.approx(expected, rel=1e-3)


class RunsOut(nn.Module):
    def forward(self, x):
        raise torch.OutOfMemoryError("planned")


@EVERY
def test_a_forward_pass_that_raises_keeps_nothing(activations):
    """What it had computed goes at once, so that a smaller batch can be tried."""
    sequence = ReversibleSequence([AdditiveCoupling(RunsOut())], activations, exact=False)
    x1, x2 = (x.requires_grad_() * 2 for x in torch.randn(2, 4, 6))
    alive = weakref.ref(x1)
    gc.disable()
    try:
        with suppress(torch.OutOfMemoryError):
            sequence(x1, x2)
        del x1, x2
        assert alive() is None
    finally:
        gc.enable()
