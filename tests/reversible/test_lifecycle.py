"""Sequences over their life: runs that repeat, mistakes that pass, copies, counters, and one inside another."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from revnet import ReversibleSequence, is_recomputing
from revnet.models import revnet38
from revnet.profiling import MemoryTimeline
from revnet.reversible import Watch
from tests.reversible.networks import BRANCHES, MODES, blocks, same, sequence, step

VALUES = ("store", "recompute", "reconstruct")


@pytest.fixture
def x():
    return torch.randn(3, 8, 4, 4, dtype=torch.float64)


@pytest.fixture
def _deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_are_bit_equal_under_deterministic_algorithms(activations, exact, device, autocast):
    first, second = (trained(activations, exact, device, autocast) for _ in range(2))
    assert all(map(torch.equal, first, second))
    if exact:
        assert all(map(torch.equal, first, trained("store", exact, device, autocast)))


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
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


def configured(activations, exact):
    net = sequence([activations, "store", *[activations] * 4], exact=exact)
    net.watch = Watch(warn_above=0.5, raise_above=0.75)
    net.check_determinism = True
    return net


CLONES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": lambda net: torch.load(saved(net), weights_only=False),
}


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@MODES
@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_a_copy_has_the_settings_and_a_life_of_its_own(activations, exact, clone, x):
    net = configured(activations, exact)
    step(net, x)
    twin = clone(net)
    assert (twin.plan(), twin.exact, twin.check_determinism) == (net.plan(), exact, True)
    assert (twin.watch.warn_above, twin.watch.raise_above) == (0.5, 0.75)
    (y, expected), (z, found) = step(net, x), step(twin, x)
    assert torch.equal(y, z)
    assert all(map(torch.equal, found, expected))
    twin.activations = "store"
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert net.activations == (activations, "store", *[activations] * 4)
    assert same(step(net, x)[1], expected, exact=True)


@MODES
def test_a_copy_between_the_passes_leaves_the_backward_pass_alone(activations, exact, x):
    net, truth = sequence(activations, exact=exact), sequence("store", exact=exact)
    y = net(x)
    copy.deepcopy(net)
    y.square().mean().backward()
    _, (_, *expected) = step(truth, x)
    assert same([p.grad for p in net.parameters()], expected, exact)


@MODES
def test_every_way_of_keeping_activations_loads_the_weights_of_every_other(activations, exact, x):
    for value in VALUES:
        for other_exact in (False, True):
            source = sequence(value, exact=other_exact)
            step(source, x)
            net = sequence(activations, exact=exact)
            net.load_state_dict(torch.load(saved(source.state_dict()), weights_only=True), strict=True)
            assert all(map(torch.equal, net.state_dict().values(), source.state_dict().values()))


@MODES
def test_flop_counter_finds_four_thirds_of_a_store_step(activations, exact):
    def flops(value):
        net = ReversibleSequence(blocks(4, 4), value, exact)
        halves = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            y1, y2 = net(*halves)
            (y1 + y2).sum().backward()
        return counter.get_total_flops()

    assert 3 * flops(activations) == 4 * flops("store") > 0


@MODES
def test_flop_counter_works_over_a_whole_network(activations, exact):
    def flops(value):
        with FlopCounterMode(display=False) as counter:
            revnet38(activations=value, exact=exact)(torch.randn(2, 3, 32, 32)).sum().backward()
        return counter.get_total_flops()

    assert flops(activations) / flops("store") == pytest.approx(4 / 3, rel=1e-2)


class Around(nn.Module):
    """A module that hands its input on through a function."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, x):
        return self.function(self.inner, x)


@MODES
@pytest.mark.parametrize("inner", VALUES)
def test_a_sequence_inside_a_sequence(activations, exact, inner, x):
    def nested(outer, inner):
        net = sequence(outer, 2, 4, exact=exact)
        for block in net[1:-1]:
            block.f = sequence(inner, 2, 2, exact=exact)
        return net

    y, truth = step(nested("store", "store"), x)
    z, found = step(nested(activations, inner), x)
    assert torch.equal(y, z)
    assert same(found, truth, exact)


@MODES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_sequence_inside_checkpoint(activations, exact, use_reentrant, x):
    def checkpointed(net, x):
        return checkpoint(net, x, use_reentrant=use_reentrant)

    nets = {v: sequence(v, branch=BRANCHES["dropout"], exact=exact) for v in (activations, "store")}
    _, truth = step(nets["store"], x)
    _, found = step(Around(nets[activations], checkpointed), x)
    assert same(found, truth, exact)


@MODES
def test_checkpoint_inside_a_branch(activations, exact, x):
    def build(value):
        net = sequence(value, branch=BRANCHES["dropout"], exact=exact)
        for block in net[1:-1]:
            block.f = Around(block.f, lambda module, x: checkpoint(module, x, use_reentrant=False))
        return net

    _, truth = step(sequence("store", branch=BRANCHES["dropout"], exact=exact), x)
    _, found = step(build(activations), x)
    assert same(found, truth, exact)


@MODES
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpoint_inside_a_branch_is_torchs_clear_error(activations, exact, x):
    net = sequence(activations, exact=exact)
    net[2].f = Around(net[2].f, lambda module, x: checkpoint(module, x, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        step(net, x)


@MODES
@pytest.mark.parametrize("parametrization", [spectral_norm, weight_norm])
def test_parametrised_weights(activations, exact, parametrization, x):
    def branch(channels):
        return nn.Sequential(parametrization(nn.Conv2d(channels, channels, 3, padding=1)), nn.Tanh())

    stored, net = (sequence(value, branch=branch, exact=exact) for value in ("store", activations))
    for _ in range(2):
        _, truth = step(stored, x)
        _, found = step(net, x)
    assert same(found, truth, exact)
    assert all(map(torch.equal, net.buffers(), stored.buffers()))
