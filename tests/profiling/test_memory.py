"""The memory of a step by hand, and against torch's own tracker."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from revnet.models import get_model, list_models
from revnet.profiling import estimate, measure_memory
from revnet.profiling.memory import memory_of_step
from tests.sizes import others_slow

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.filterwarnings("ignore:Module is None:UserWarning")
@pytest.mark.parametrize("name", others_slow(list_models(), ["revnet38", "resnet32", "revnet18", "revnet50"]))
@pytest.mark.parametrize("activations", ["store", "recompute", "reconstruct"])
def test_estimate_agrees_with_torchs_mem_tracker(name, activations):
    network, x = get_model(name, activations=activations), torch.randn(2, 3, 32, 32)
    tracker = MemTracker()
    tracker.track_external(network, x)
    with tracker:
        network(x).float().square().mean().backward()
    parts = {str(k): v for k, v in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    theirs = sum(v for k, v in parts.items() if k.endswith(("ACT", "TEMP", "GRAD")))
    ours = estimate(network, x.shape)
    assert ours.total - ours.parameters - ours.input == pytest.approx(theirs, rel=0.02)


def test_memory_of_a_linear_layer_by_hand():
    model, x = nn.Sequential(nn.Linear(100, 100), nn.ReLU()), torch.randn(50, 100)
    memory = measure_memory(model, x, loss=lambda y: y.sum())
    assert memory.parameters == memory.gradients == 4 * (100 * 100 + 100)
    assert memory.optimizer == 0
    assert memory.input == 4 * 50 * 100
    # The output of the ReLU is kept; the linear layer's is freed; the loss is a number.
    assert memory.kept == 4 * (50 * 100 + 1)
    assert memory.peak > memory.kept
    assert memory.activations == memory.kept  # at the peak the ReLU is being differentiated
    assert memory.peak == memory.activations + memory.temporaries


@pytest.mark.parametrize(
    ("optimizer", "states", "copies"),
    [
        (None, 0, 2),
        (SGD, 1, 3),
        (torch.optim.SGD, 0, 2),
        (partial(torch.optim.AdamW, fused=True), 2, 4),
        (partial(torch.optim.AdamW, foreach=True), 2, 5),  # and the roots of the second moments
    ],
    ids=["none", "momentum", "plain", "fused", "foreach"],
)
def test_total_of_a_step_of_the_optimizer_by_hand(optimizer, states, copies):
    model, x = nn.Linear(1000, 1000, bias=False), torch.randn(1, 1000)
    size = 4 * 1000 * 1000
    for memory in (measure_memory(model, x, optimizer=optimizer), estimate(model, x.shape, optimizer=optimizer)):
        assert memory.optimizer == pytest.approx(states * size, abs=100)
        assert memory.total == pytest.approx(copies * size, abs=40_000)
        assert memory.peak < 40_000


class Workspace:
    """Stands in for the CUDA allocator: it took `extra` more than ever lived in tensors."""

    def __init__(self, device):
        self.figures = [10_000_000, 99_000_000]

    def reset(self):
        del self.figures[0]

    def most(self):
        return self.figures[0]


def test_what_the_allocator_took_beyond_the_tensors_is_counted():
    model, x = nn.Linear(1000, 1000), torch.randn(1, 1000)
    without = memory_of_step(model, x, lambda y: y.sum(), None, None)
    model.zero_grad()
    most = memory_of_step(model, x, lambda y: y.sum(), None, None, Workspace(x.device))
    unseen = 10_000_000 - (without.total - without.parameters - without.input)
    assert unseen > 0
    assert most.temporaries == without.temporaries + unseen
    assert most.total == without.total + unseen
    stepped = memory_of_step(model, x, lambda y: y.sum(), None, SGD, Workspace(x.device))
    assert stepped.total == 99_000_000 + without.parameters + without.input


def test_memory_prints_as_a_table():
    lines = str(measure_memory(nn.Linear(1000, 1000), torch.randn(1, 1000), optimizer=SGD)).splitlines()
    assert lines[0].split() == ["parameters", "4.0", "MB"]
    assert [line.split()[0] for line in lines[-2:]] == ["peak", "total"]
