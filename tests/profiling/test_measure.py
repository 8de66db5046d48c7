"""Memory and time of a training step."""

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from revnet import set_activations
from revnet.models import get_model
from revnet.profiling import MemoryTimeline, measure, measure_memory, measure_time


def test_timeline_counts_births_and_deaths():
    x = torch.zeros(1000)
    with MemoryTimeline([x]) as timeline:
        a = x + 1
        b = a * 2
        moment = timeline.now()
        del a
        c = b.view(10, 100)
    assert timeline.peak() == 8000
    assert timeline.live(moment) == 8000
    assert timeline.live() == 4000
    assert timeline.live(without=[c]) == 0
    assert timeline.bytes_over_time() == [4000, 8000, 4000]


@pytest.mark.filterwarnings("ignore:Module is None:UserWarning")
@pytest.mark.parametrize("name", ["resnet32", "revnet38"])
@pytest.mark.parametrize("activations", ["store", "recompute", "reconstruct"])
def test_peak_agrees_with_torchs_mem_tracker(name, activations):
    network, x = get_model(name, activations=activations), torch.randn(8, 3, 32, 32)
    with MemoryTimeline([x, *network.parameters(), *network.buffers()]) as timeline:
        network(x).float().square().mean().backward()
    network.zero_grad()
    tracker = MemTracker()
    tracker.track_external(network, x)
    with tracker:
        network(x).float().square().mean().backward()
    parts = {str(k): v for k, v in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    theirs = sum(v for k, v in parts.items() if k.endswith(("ACT", "TEMP", "GRAD")))
    assert timeline.peak() == pytest.approx(theirs, rel=0.02)


def test_memory_of_a_linear_layer_by_hand():
    model, x = nn.Sequential(nn.Linear(100, 100), nn.ReLU()), torch.randn(50, 100)
    memory = measure_memory(model, x, loss=lambda y: y.sum())
    assert memory.parameters == memory.gradients == 4 * (100 * 100 + 100)
    # The output of the ReLU is kept; the linear layer's is freed; the loss is a number.
    assert memory.kept == 4 * (50 * 100 + 1)
    assert memory.peak > memory.kept


def test_measure_leaves_the_model_usable_and_orders_the_strategies():
    network, x = get_model("revnet38"), torch.randn(4, 3, 16, 16)
    peaks = {}
    for value in ("store", "recompute", "reconstruct"):
        set_activations(network, value)
        result = measure(network, x, repeats=1)
        peaks[value] = result.memory.peak
        assert result.time.step > 0
        assert result.images_per_second > 0
    assert peaks["store"] > peaks["recompute"] > peaks["reconstruct"]


def test_time_is_the_median_with_quartiles():
    time = measure_time(nn.Linear(10, 10), torch.randn(4, 10), repeats=7)
    low, high = time.step_quartiles
    assert 0 < low <= time.step <= high
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_time(nn.Linear(2, 2), torch.randn(1, 2), repeats=0)


def test_autocast_and_outputs_of_any_structure():
    class Two(nn.Linear):
        def forward(self, x):
            return {"a": super().forward(x), "b": [x, 3]}

    assert measure_memory(Two(8, 8), torch.randn(4, 8), autocast=torch.bfloat16).kept > 0

    class NoTensor(nn.Linear):
        def forward(self, x):
            return 3

    with pytest.raises(ValueError, match="returned no floating-point tensor; pass `loss`"):
        measure_memory(NoTensor(8, 8), torch.randn(4, 8))
