"""Plans that spend a memory budget."""

import random
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequence, set_activations
from revnet.flows import nice
from revnet.models import get_model
from revnet.profiling import estimate, measure_memory, plan
from revnet.profiling.costs import LayerCost, layer_costs
from revnet.profiling.plan import cheapest, leanest, predicted_peak, predicted_seconds
from revnet.profiling.step import mean_square
from revnet.reversible import ACTIVATIONS, Merge, Split, slots

SHAPE = (4, 3, 16, 16)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def random_costs(draw: random.Random) -> list[LayerCost]:
    costs = []
    for index in range(draw.randint(1, 8)):
        values = draw.choice([ACTIVATIONS, ("store", "recompute"), ("store", "reconstruct")])
        state = draw.randint(0, 9)
        costs.append(
            LayerCost(
                name=str(index),
                seconds={value: draw.randint(1, 9) for value in values},
                working={value: draw.randint(0, 30) for value in values},
                inner={value: draw.randint(0, 20) for value in values},
                input_bytes=state,
                input_stored=draw.randint(0, state),
                starts_sequence=draw.random() < 0.3,
            )
        )
    return costs


@pytest.mark.parametrize("seed", range(40))
def test_the_search_finds_what_brute_force_finds(seed):
    draw = random.Random(seed)
    costs = random_costs(draw)
    every = [
        (predicted_peak(costs, values), predicted_seconds(costs, values))
        for values in product(*(cost.seconds for cost in costs))
    ]
    least = min(peak for peak, _ in every)
    assert predicted_peak(costs, leanest(costs)) == least
    assert cheapest(costs, least - 1) is None
    for budget in {least, *(draw.randint(least, max(peak for peak, _ in every)) for _ in range(4))}:
        found = cheapest(costs, budget)
        assert found is not None
        assert predicted_peak(costs, found) <= budget
        assert predicted_seconds(costs, found) == min(seconds for peak, seconds in every if peak <= budget)


def test_the_search_over_a_real_network_finds_what_brute_force_finds():
    blocks = [ReversibleBlock(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())) for _ in range(6)]
    model = ReversibleSequence([Split(), *blocks, Merge()])
    costs = layer_costs(model, (16, 16), mean_square, None)
    every = list(product(*(cost.seconds for cost in costs)))
    for share in (1, 0.8, 0.6):
        budget = int(share * predicted_peak(costs, ["store"] * len(costs)))
        seconds = [predicted_seconds(costs, v) for v in every if predicted_peak(costs, v) <= budget]
        found = cheapest(costs, budget)
        assert (found is None) == (not seconds)
        if found is not None:
            assert predicted_seconds(costs, found) == min(seconds)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["revnet38", pytest.param("revnet56", marks=pytest.mark.slow), "resnet32"])
def test_the_peak_that_the_search_expects_is_that_of_the_step(name, exact):
    network = get_model(name, exact=exact)
    shape = (4, 3, 64, 64) if name == "revnet56" else SHAPE
    costs = layer_costs(network, shape, mean_square, None)
    draw = random.Random(0)
    plans = [[draw.choice(sorted(cost.seconds)) for cost in costs] for _ in range(3)]
    for activations, tolerance in [*((value, 0.02) for value in ACTIVATIONS), *((values, 0.1) for values in plans)]:
        set_activations(network, activations)
        values = [slot.value() for slot in slots(network)]
        memory = estimate(network, shape)
        # Gradients of the parameters belong to the prediction.
        assert memory.peak <= predicted_peak(costs, values) * (1 + tolerance)
        assert predicted_peak(costs, values) <= (memory.peak + memory.gradients) * (1 + tolerance)


@pytest.mark.parametrize("dtype", [pytest.param(None, marks=pytest.mark.slow), torch.bfloat16])
def test_the_step_that_was_planned_stays_within_the_budget(dtype):
    network = get_model("revnet38")
    before = [slot.value() for slot in slots(network)]
    store = get_model("revnet38", activations="store")
    most = estimate(store, SHAPE, dtype=dtype, optimizer=SGD).total
    x, seconds = torch.randn(SHAPE), []
    least = estimate(get_model("revnet38"), SHAPE, dtype=dtype, optimizer=SGD).total
    for share in (0.02, 0.6, 1.0):
        budget = int(1.003 * (least + share * (most - least)))
        found = plan(network, SHAPE, budget, dtype=dtype, optimizer=SGD)
        assert [slot.value() for slot in slots(network)] == before
        seconds.append(found.seconds_over_store)
        set_activations(store, found)
        assert [slot.value() for slot in slots(store)] == list(found)
        measured = measure_memory(store, x, dtype=dtype, optimizer=SGD)
        assert measured.total <= budget
        assert measured.total == pytest.approx(found.memory.total, rel=0.01)
        assert share < 0.1 or measured.total >= 0.9 * budget  # what is given is spent
    assert seconds == sorted(seconds, reverse=True)
    assert set(found) == {"store"}
    assert found.seconds_over_store == seconds[-1] == 1.0


def test_gradients_under_a_plan_are_those_of_store():
    network = get_model("revnet38", exact=True).double()
    x = torch.randn(SHAPE, dtype=torch.float64)
    gradients = []
    for activations in ("store", plan(network, SHAPE, "11MB")):
        set_activations(network, activations)
        network.zero_grad()
        network(x).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_plan_is_printed_part_by_part():
    found = plan(get_model("revnet38"), SHAPE, "6MB")
    first, *parts = str(found).splitlines()
    assert first == (
        f"{found.memory.total / 1e6:,.1f} MB in all, {found.memory.peak / 1e6:,.1f} MB of them activations and "
        f"temporaries; {found.seconds_over_store:.2f} times the time of storing everything"
    )
    assert [part.partition(":")[0] for part in parts] == ["stem", "layer1", "layer2", "layer3", "tail"]
    assert len(found) == len(found.names) == len(list(found))
    assert found[0] == found.values[0]


def test_an_impossible_budget_says_the_least_possible():
    network = get_model("revnet38")
    with pytest.raises(ValueError, match=r"='3MB' is too small .* the least possible is ([\d,]+) bytes") as caught:
        plan(network, SHAPE, "3MB", optimizer=SGD)
    least = int(str(caught.value).partition("possible is ")[2].partition(" bytes")[0].replace(",", ""))
    assert plan(network, SHAPE, least, optimizer=SGD).memory.total <= least
    with pytest.raises(ValueError, match="the least possible"):
        plan(network, SHAPE, least - 1, optimizer=SGD)


def test_what_reconstruction_of_everything_takes_is_enough():
    network, shape = get_model("revnet38"), (64, 3, 32, 32)
    least = estimate(network, shape).total
    assert plan(network, shape, least).memory.total <= least


class Wrapped(nn.Module):
    """Something around a network, called as it is; its `log_prob` is that of no flow."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def log_prob(self, x):
        return self(x).log_softmax(1)


def test_a_flow_is_refused_for_layers_that_are_not_called():
    flow = nice((8,), hidden=8, layers=1, dequantise=False)
    with pytest.raises(ValueError, match=r"^Flow runs stages\.0\.2 without calling it, as flows do for the log-det"):
        plan(flow, (2, 8), "1GB")
    with pytest.raises(ValueError, match=r"^Wrapped runs network\.stages\.0\.2 without calling it"):
        plan(Wrapped(flow), (2, 8), "1GB")


def test_a_method_log_prob_alone_makes_no_flow():
    found = plan(Wrapped(get_model("revnet38")), SHAPE, "6MB")
    assert found.values == plan(get_model("revnet38"), SHAPE, "6MB").values


class HalfUsed(nn.Module):
    """One of its sequences does not run."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = (
            ReversibleSequence([Split(), ReversibleBlock(nn.Linear(8, 8), nn.Linear(8, 8)), Merge()]) for _ in range(2)
        )

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_does_not_run_is_no_hindrance():
    assert set(plan(HalfUsed(), (4, 16), "1GB")) == {"store"}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="Linear has no ReversibleSequence, so there is nothing to plan"):
        plan(nn.Linear(3, 3), (2, 3), "1GB")
    with pytest.raises(ValueError, match="budget must be a positive integer"):
        plan(get_model("revnet38"), SHAPE, "1 gallon")
    with pytest.raises(ValueError, match=r"input_shape=\(4, 5, 16, 16\)"):
        plan(get_model("revnet38"), (4, 5, 16, 16), "1GB")
