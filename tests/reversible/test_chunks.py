"""A sequence that hands over its gradients chunk by chunk."""

import pytest
import torch

from revnet import ReversibleSequence
from revnet.models import revnet38
from revnet.reversible import set_chunk_size
from tests.reversible.networks import EXACT, MODES, relative, same, sequence, step


@pytest.fixture
def x():
    return torch.randn(3, 8, 4, 4, dtype=torch.float64)


def functions(y):
    """The reversible Functions of a graph."""
    found, nodes, seen = 0, [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += node.name() == "_ReversibleFunctionBackward"
            nodes += [parent for parent, _ in node.next_functions]
    return found


@MODES
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunks_have_the_gradients_and_statistics_of_store(activations, exact, chunk_size, x):
    truth, net = sequence("store", 4, exact=exact), sequence(activations, 4, exact=exact)
    net.chunk_size = chunk_size
    (y, expected), (z, found) = step(truth, x), step(net, x)
    assert torch.equal(y, z)
    assert same(found, expected, exact)
    assert all(map(torch.equal, truth.buffers(), net.buffers()))
    if activations == "reconstruct":
        assert net.reconstruction_error is not None
    assert functions(net(x.requires_grad_())) == (-(-len(net) // chunk_size) if activations == "reconstruct" else 0)


@EXACT
@pytest.mark.parametrize("between", ["store", "recompute"])
def test_chunks_are_counted_within_each_run_of_a_mixed_plan(between, exact, x):
    plan = ["reconstruct", between, *["reconstruct"] * 4]
    truth, net = sequence("store", 4, exact=exact), sequence(plan, 4, exact=exact)
    net.chunk_size = 3
    assert same(step(net, x)[1], step(truth, x)[1], exact)
    assert functions(net(x.requires_grad_())) == 1 + 2


def test_gradients_come_out_chunk_by_chunk(x):
    net = sequence("reconstruct", 4)  # Split, four blocks, Merge
    net.chunk_size = 3
    order = []
    for index, layer in enumerate(net):
        for p in layer.parameters():
            p.register_post_accumulate_grad_hook(lambda _, index=index: order.append(index))
        for step_of_layer in getattr(layer, "steps", list)():
            step_of_layer.branch.register_forward_hook(lambda *_, index=index: order.append(-index))
    y = net(x.requires_grad_())
    order.clear()
    y.sum().backward()
    last_gradient = max(number for number, index in enumerate(order) if index in (3, 4))
    assert last_gradient < order.index(-2)  # before the other chunk is evaluated again


def test_the_inverse_has_the_chunks_too(x):
    net = sequence("reconstruct", 4)
    net.chunk_size = 2
    assert net.inv.chunk_size == 2
    truth = sequence("store", 4)
    assert relative(step(net.inv, x)[1], step(truth.inv, x)[1]) < 1e-10


def test_a_network_has_the_chunks_of_all_its_sequences():
    network = revnet38(num_classes=3)
    set_chunk_size(network, 4)
    assert {m.chunk_size for m in network.modules() if isinstance(m, ReversibleSequence)} == {4}
    set_chunk_size(network, None)
    assert network.layer1.chunk_size is None


@pytest.mark.parametrize("value", [0, -1, 2.5, "4"])
def test_chunk_size_is_a_number_of_layers(value):
    net = sequence("reconstruct", 2)
    with pytest.raises(ValueError, match=r"chunk_size=.*: give a number of layers, at least 1, or None"):
        net.chunk_size = value
    with pytest.raises(ValueError, match="set_chunk_size: Linear holds no ReversibleSequence"):
        set_chunk_size(torch.nn.Linear(2, 2), 2)
