"""Copies and saved weights."""

import copy
import io
import pickle

import pytest
import torch

from revnet.reversible import Watch
from tests.reversible.networks import MODES, VALUES, same, sequence, step


@pytest.fixture
def x():
    return torch.randn(3, 8, 4, 4, dtype=torch.float64)


def configured(activations, exact):
    net = sequence([activations, "store", *[activations] * 4], exact=exact)
    net.watch = Watch(warn_above=0.5, raise_above=0.75)
    net.check_determinism = True
    net.chunk_size = 2
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
    assert (twin.plan(), twin.exact, twin.check_determinism, twin.chunk_size) == (net.plan(), exact, True, 2)
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
