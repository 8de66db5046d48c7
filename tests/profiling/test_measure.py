"""Measuring a training step leaves the model as it was."""

from functools import partial

import pytest
import torch
from torch import nn

from revnet import set_activations
from revnet.models import get_model
from revnet.profiling import device_name, estimate, measure, measure_memory, measure_time

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)


def test_measure_orders_the_strategies():
    network, x = get_model("revnet38"), torch.randn(4, 3, 16, 16)
    results = {}
    for value in ("store", "recompute", "reconstruct"):
        set_activations(network, value)
        results[value] = measure(network, x, repeats=1)
        assert results[value].time.step > 0
        assert results[value].images_per_second > 0
    peaks = [result.memory.peak for result in results.values()]
    assert peaks[0] > peaks[1] > peaks[2]
    # The second forward pass is one third of the first and the backward pass together.
    assert results["reconstruct"].flops == pytest.approx(4 / 3 * results["store"].flops, rel=0.02)


def test_flops_of_a_linear_layer_by_hand():
    # The forward pass, the weight's gradient and none for the input.
    assert measure(nn.Linear(8, 16), torch.randn(4, 8), repeats=1).flops == 2 * (2 * 4 * 8 * 16)


@pytest.mark.parametrize("take", [measure_memory, measure_time, partial(measure, repeats=1)])
def test_the_model_and_the_random_generator_are_left_as_they_were(take):
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
    network[3].eval()
    network(torch.randn(4, 8)).sum().backward()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    random = torch.get_rng_state()
    take(network, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), optimizer=SGD)
    assert all(t.equal(before[name]) for name, t in network.state_dict().items())
    assert torch.get_rng_state().equal(random)
    assert [module.training for module in network] == [True, True, True, False]
    assert all(p.grad is None for p in network.parameters())


class Remembers(nn.Linear):
    """Fills one buffer, replaces a second, adds a third and drops a fourth."""

    def __init__(self):
        super().__init__(8, 8)
        for name, value in (("filled", None), ("replaced", torch.zeros(8)), ("dropped", torch.ones(8))):
            self.register_buffer(name, value)

    def forward(self, x):
        self.filled, self.replaced = x.detach().mean(0), self.replaced + 1
        self.register_buffer("added", x.detach())
        self._buffers.pop("dropped", None)
        return super().forward(x)


@pytest.mark.parametrize("take", [measure_memory, measure_time, partial(measure, repeats=1)])
def test_buffers_are_left_as_they_were(take):
    network = Remembers()
    before = {name: id(buffer) for name, buffer in network._buffers.items()}
    take(network, torch.randn(4, 8))
    assert {name: id(buffer) for name, buffer in network._buffers.items()} == before
    assert network.filled is None
    assert network.replaced.equal(torch.zeros(8))


class Counts(nn.Linear):
    """One with a state that is no tensor."""

    def __init__(self):
        super().__init__(8, 8)
        self.calls, self.last = 0, None

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        return super().forward(x)


@pytest.mark.parametrize("take", [measure_memory, measure_time, partial(measure, repeats=1)])
def test_plain_attributes_are_left_as_they_were(take):
    network = Counts()
    take(network, torch.randn(4, 8))
    assert (network.calls, network.last) == (0, None)


class Grows(nn.Linear):
    """One that registers a parameter at its first forward pass."""

    def __init__(self):
        super().__init__(8, 8)
        self.scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = nn.Parameter(torch.ones(8))
        return super().forward(x) * self.scale


def test_what_a_first_forward_pass_registers_is_registered_once():
    network = Grows()
    measure_memory(network, torch.randn(4, 8))
    assert network.scale is dict(network.named_parameters())["scale"]


def test_autocast_is_left_out_only_where_all_of_the_network_has_the_dtype():
    x = torch.randn(4, 8)
    mixed = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8).bfloat16()})
    mixed.forward = lambda x: mixed["b"](mixed["a"](x))  # which only autocast brings together
    assert measure_memory(mixed, x, dtype=torch.bfloat16).kept > 0
    assert measure_memory(nn.Linear(8, 8).bfloat16(), x.bfloat16(), dtype=torch.bfloat16).kept > 0


def test_time_is_the_median_with_quartiles():
    time = measure_time(nn.Linear(10, 10), torch.randn(4, 10), optimizer=SGD, repeats=7)
    low, high = time.step_quartiles
    assert 0 < low <= time.step <= high
    assert min(time.forward, time.backward, time.optimizer) > 0
    assert measure_time(nn.Linear(10, 10), torch.randn(4, 10)).optimizer == 0
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_time(nn.Linear(2, 2), torch.randn(1, 2), repeats=0)
    with pytest.raises(ValueError, match="warmup must be at least 0, got -5"):
        measure_time(nn.Linear(2, 2), torch.randn(1, 2), warmup=-5)


def test_a_measurement_says_what_it_was_measured_with_and_is_printed():
    result = measure(nn.Linear(1000, 1000), torch.randn(4, 1000), dtype=torch.bfloat16, repeats=2)
    assert result.environment["torch"] == torch.__version__
    assert result.environment["dtype"] == "bfloat16"
    assert result.environment["device"] == device_name("cpu") != ""
    words = [line.split()[:3] for line in str(result).splitlines()]
    assert ["parameters", "4.0", "MB"] in words
    assert {"peak", "total", "step", "arithmetic", "speed", "torch"} <= {first for first, *_ in words}


def test_autocast_and_outputs_of_any_structure():
    class Two(nn.Linear):
        def forward(self, x):
            return {"a": super().forward(x), "b": [x, 3]}

    assert measure_memory(Two(8, 8), torch.randn(4, 8), dtype=torch.bfloat16).kept > 0

    class NoTensor(nn.Linear):
        def forward(self, x):
            return 3

    with pytest.raises(ValueError, match="returned no floating-point tensor; pass `loss`"):
        measure_memory(NoTensor(8, 8), torch.randn(4, 8))


def test_mistakes_are_told():
    with pytest.raises(
        ValueError, match=r"snapshot='memory.pickle' records the CUDA allocator, but the input is on cpu"
    ):
        measure_memory(nn.Linear(2, 2), torch.randn(2, 2), snapshot="memory.pickle")
    with pytest.raises(ValueError, match="input is on cpu, the model on meta; move one of them"):
        measure_memory(nn.Linear(2, 2, device="meta"), torch.randn(2, 2))


@pytest.mark.gpu
def test_cuda_counts_the_allocator_and_records_it(tmp_path):
    network = get_model("revnet38").cuda()
    x = torch.randn(64, 3, 32, 32, device="cuda")
    memory = measure_memory(network, x, optimizer=SGD, snapshot=tmp_path / "memory.pickle")
    estimated = estimate(network, x.shape, optimizer=SGD)
    assert (memory.kept, memory.optimizer) == (estimated.kept, estimated.optimizer)
    assert estimated.peak <= memory.peak
    assert estimated.total <= memory.total <= estimated.total + 128e6  # workspaces of convolutions
    assert (tmp_path / "memory.pickle").stat().st_size > 0


class Scaled(nn.Linear):
    """With a buffer that requires grad, and one whose elements are all in one place."""

    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("scale", torch.ones(8, requires_grad=True))
        self.register_buffer("mask", torch.ones(1).expand(8))

    def forward(self, x):
        return super().forward(x) * self.scale * self.mask


@pytest.mark.parametrize("take", [measure_memory, measure_time, partial(measure, repeats=1)])
def test_gradients_of_buffers_and_of_the_input_are_left_as_they_were(take):
    network, x = Scaled(), torch.randn(4, 8, requires_grad=True)
    network(x).sum().backward()
    before = network.scale.grad.clone(), x.grad.clone()
    take(network, x)
    assert network.scale.grad.equal(before[0])
    assert x.grad.equal(before[1])


def test_a_slice_of_a_data_set_counts_as_what_it_is():
    network, images = nn.Linear(8, 8), torch.randn(1000, 8)
    assert measure_memory(network, images[:4]) == measure_memory(network, images[:4].clone())
    assert measure_memory(network, images[:4]) == estimate(network, (4, 8))


def test_a_buffer_that_requires_grad_is_estimated_as_measured():
    network = Scaled().requires_grad_(False)
    network.scale.requires_grad_()
    assert estimate(network, (4, 8)) == measure_memory(network, torch.randn(4, 8))
