"""What becomes of the activations, chosen for a sequence, for each layer, and in a live network."""

import pytest
import torch
from torch import nn

from revnet import AdditiveCoupling, ReversibleSequence, set_activations
from revnet.profiling import measure_memory
from revnet.reversible import Merge, Split, Switched, slots
from tests.reversible.networks import EXACT, Transition, basic, blocks, same, sequence, step


def with_transition():
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        return [Split(), *blocks(2, 4), Transition(4).double(), *blocks(2, 4), Merge()]


@EXACT
def test_a_layer_without_inverse_is_recomputed_inside_a_reconstructed_sequence(exact):
    net = ReversibleSequence(with_transition(), "reconstruct", exact)
    assert net.plan() == ("reconstruct",) * 3 + ("recompute",) + ("reconstruct",) * 3
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    _, truth = step(ReversibleSequence(with_transition(), "store", exact), x)
    _, found = step(net, x)
    assert same(found, truth, exact)


def test_splits_and_merges_are_stored_where_blocks_are_recomputed():
    net = ReversibleSequence(with_transition(), "recompute")
    assert net.plan() == ("store", *["recompute"] * 5, "store")
    net.activations = ["recompute"] * 7
    assert net.plan() == ("recompute",) * 7


def test_the_coupling_behind_a_transition_is_undone_where_blocks_are_recomputed():
    def network(activations):
        torch.manual_seed(3)
        layers = [
            Split(),
            Transition(4).double(),
            AdditiveCoupling(basic(4).double(), swap=True),
            *blocks(1, 4),
            Merge(),
        ]
        return ReversibleSequence(layers, activations, exact=False)

    assert network("recompute").plan() == ("store", "recompute", "reconstruct", "recompute", "store")
    gradients = []
    for activations in ("store", "recompute"):
        net, x = network(activations), torch.empty(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
        x.data.copy_(torch.linspace(-1, 1, x.numel()).view_as(x))
        net(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Louder(AdditiveCoupling):
    def forward(self, *state, context=None):
        return tuple(2 * x for x in super().forward(*state, context=context))


def test_a_coupling_with_something_of_its_own_behind_a_transition_is_recomputed():
    hooked = AdditiveCoupling(basic(4).double(), swap=True)
    hooked.register_full_backward_hook(lambda module, inputs, outputs: None)
    for layer in (Louder(basic(4).double(), swap=True), hooked):
        net = ReversibleSequence([Split(), Transition(4).double(), layer], "recompute", exact=False)
        assert net.plan() == ("store", "recompute", "recompute")
        y1, y2 = net(torch.randn(2, 8, 6, 6, dtype=torch.float64))
        (y1 * y2).sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_a_plan_is_kept_as_it_is_given():
    plan = ("reconstruct", "store", "recompute", "recompute", "reconstruct", "store", "reconstruct")
    net = ReversibleSequence(with_transition(), list(plan))
    assert net.activations == net.plan() == plan


def test_a_failed_switch_leaves_the_old_value():
    net = sequence("recompute")
    with pytest.raises(ValueError, match="values for"):
        net.activations = ["store"]
    assert net.activations == "recompute"


def test_set_activations_switches_values_and_distributes_plans():
    net = nn.Sequential(sequence("store", 1), nn.Tanh(), sequence("store", 2))
    set_activations(net, "recompute")
    assert net[0].activations == net[2].activations == "recompute"
    set_activations(net, ["store", "reconstruct", "store"] + ["recompute"] * 4)
    assert net[0].activations == ("store", "reconstruct", "store")
    assert net[2].activations == ("recompute",) * 4


class Network(Switched):
    stem, tail = ("conv",), ("act", "norm")

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv2d(8, 8, 1), nn.Sequential(nn.Tanh(), nn.Sigmoid()), nn.BatchNorm2d(8)
        self.body = sequence("store", 1)

    def forward(self, x):
        return self.run_tail(self.body(self.run_stem(x)))


def test_the_slots_of_a_network_are_its_layers_between_stem_and_tail():
    net = nn.Sequential(nn.Identity(), Network())
    assert [slot.name for slot in slots(net)] == ["1.stem", "1.body.0", "1.body.1", "1.body.2", "1.tail"]
    assert [slot.modules() for slot in slots(net)][:2] == [[net[1].conv], [net[1].body[0]]]
    assert slots(net)[-1].modules() == [net[1].act, net[1].norm]
    set_activations(net, "reconstruct")
    assert [slot.value() for slot in slots(net)] == ["recompute", *["reconstruct"] * 3, "recompute"]
    plan = ["store", "reconstruct", "recompute", "store", "recompute"]
    set_activations(net, plan)
    assert [slot.value() for slot in slots(net)] == plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (["store"] * 3, "one value for each layer, stem and tail included; got 3 values for 5"),
        (["reconstruct"] + ["store"] * 4, 'asks 1.stem to reconstruct, but it has no inverse; give it "recompute"'),
        (["store"] * 4 + ["twice"], "activations must be one of 'store', 'recompute', 'reconstruct'; got 'twice'"),
    ],
)
def test_a_plan_that_does_not_fit_a_network_changes_nothing(plan, message):
    net = nn.Sequential(nn.Identity(), Network())
    with pytest.raises(ValueError, match=message):
        set_activations(net, plan)
    assert {slot.value() for slot in slots(net)} == {"store"}


def test_a_stem_and_a_tail_keep_no_more_than_their_input():
    net, x = Network().double(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    kept = {}
    for ends in ("store", "recompute"):
        set_activations(net, [ends, *["store"] * 3, ends])
        kept[ends] = measure_memory(net, x).kept
    statistics = 2 * 8 * 8
    assert (
        kept["store"] - kept["recompute"] == x.nbytes + statistics
    )  # the output of the tanh (the sigmoid's is for the input), what the norm saved


def test_a_plan_that_fails_leaves_every_sequence_as_it_was():
    net = nn.Sequential(sequence("store", 1), ReversibleSequence([Transition(2)], "store"))
    with pytest.raises(ValueError, match="to reconstruct"):
        set_activations(net, ["recompute"] * 3 + ["reconstruct"])
    assert net[0].activations == "store"


def test_set_activations_leaves_other_attributes_of_that_name_alone():
    net = nn.Sequential(sequence("store", 1), nn.Identity())
    net[1].activations = "relu"
    set_activations(net, "recompute")
    assert net[1].activations == "relu"


def test_a_slice_keeps_its_part_of_the_plan():
    net = ReversibleSequence(blocks(4, 2), ["store", "recompute", "reconstruct", "store"], exact=True)
    assert net[1:3].activations == ("recompute", "reconstruct")
    assert net[1:3].exact is True
    net.watch.raise_above, net.chunk_size, net.check_determinism = 0.5, 3, True
    assert (net[1:3].watch.raise_above, net[1:3].chunk_size, net[1:3].check_determinism) == (0.5, 3, True)
    assert net[0] is next(iter(net))


def test_a_sequence_prints_its_choices():
    text = repr(sequence("recompute", exact=True))
    assert "activations='recompute', exact=True" in text
    assert "Split(dim=1)" in text
