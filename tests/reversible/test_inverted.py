"""`seq.inv`: the same layers run backwards, with the memory and the gradients of the sequence."""

import copy

import pytest
import torch
from torch import nn

from revnet import AdditiveCoupling, AffineCoupling, ReversibleBlock, ReversibleSequence, is_recomputing
from revnet.profiling import measure_memory
from revnet.reversible import Coupling, Merge, Split, Squeeze, Step, invert
from tests.reversible.networks import EXACT, Transition, blocks, groupnorm, relative


class Branch(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.Tanh())

    def forward(self, x):
        return tuple(self.inner(x).chunk(2, 1))


class Twice(nn.Module):
    """A user's bijection with the two methods that the engine asks for."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return x * self.log_scale.exp()

    def inverse(self, y):
        return y * (-self.log_scale).exp()

    def forward_and_log_det(self, x):
        return self(x), (self.log_scale * x[0].numel()).expand(len(x))


def mixed(activations="reconstruct"):
    """Every kind of layer."""
    torch.manual_seed(3)
    layers = [
        *(Twice(), Split(), AffineCoupling(Branch(2)), ReversibleBlock(groupnorm(2), groupnorm(2)), Merge(), Squeeze()),
        *(Split(), AffineCoupling(Branch(8), swap=True), AdditiveCoupling(groupnorm(8))),
    ]
    return ReversibleSequence(layers, activations).double()


def additive(activations="reconstruct", exact=None, dtype=torch.float64, depth=4):
    return ReversibleSequence([Split(), *blocks(depth, 2, groupnorm, dtype), Merge()], activations, exact)


def step(sequence, state):
    """Output, log-determinant, and gradients of a loss on both."""
    state = [x.detach().clone().requires_grad_() for x in state]
    sequence.zero_grad()
    y, log_det = sequence.forward_and_log_det(*state)
    loss = sum(part.square().mean() for part in (y if isinstance(y, tuple) else (y,))) + log_det.sin().sum()
    loss.backward()
    return y, log_det, [x.grad for x in state] + [p.grad for p in sequence.parameters()]


def test_it_undoes_the_sequence_and_its_log_determinant_is_the_negative():
    sequence, x = mixed(), torch.randn(3, 4, 4, 4, dtype=torch.float64)
    z, log_det = sequence.forward_and_log_det(x)
    found, back = sequence.inv.forward_and_log_det(*z)
    torch.testing.assert_close(found, x)
    torch.testing.assert_close(back, -log_det)
    assert log_det.abs().min() > 0.1
    torch.testing.assert_close(sequence.inv(*z), sequence.inverse(*z))
    torch.testing.assert_close(sequence.inv.inverse(x), z)


def test_its_log_determinant_is_that_of_the_jacobian():
    sequence, x = mixed(), torch.randn(1, 4, 2, 2, dtype=torch.float64)
    z1, z2 = (h.detach() for h in sequence(x))

    def function(z):
        return sequence.inv(*z.view(2, *z1.shape)).flatten()

    jacobian = torch.autograd.functional.jacobian(function, torch.stack((z1, z2)).flatten())
    truth = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(sequence.inv.forward_and_log_det(z1, z2)[1], truth[None])


@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_gradients_are_those_of_store(activations):
    z = torch.randn(2, 3, 8, 2, 2, dtype=torch.float64)
    y, log_det, truth = step(mixed("store").inv, z)
    found_y, found_log_det, found = step(mixed(activations).inv, z)
    torch.testing.assert_close(found_y, y)
    torch.testing.assert_close(found_log_det, log_det)
    assert relative(found, truth) <= 1e-10


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_exact_gradients_are_those_of_store_to_the_bit(activations, autocast):
    z = torch.randn(3, 4, 4, 4)
    sequence = additive(activations, True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        truth = step(additive("store", True, torch.float32).inv, [z])[2]
        y, log_det, found = step(sequence.inv, [z])
    assert all(map(torch.equal, found, truth))
    assert torch.equal(log_det, torch.zeros(3))
    if activations == "reconstruct":
        assert sequence.reconstruction_error == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(sequence(y), (z * 2**16).round() / 2**16)


def test_a_branch_is_evaluated_once_in_the_backward_pass():
    sequence, counts = mixed(), {True: 0, False: 0}

    def count(*_):
        counts[is_recomputing()] += 1

    branches = [s.branch for layer in sequence if isinstance(layer, Coupling) for s in layer.steps()]
    for branch in branches:
        branch.register_forward_hook(count)
    step(sequence.inv, torch.randn(2, 3, 8, 2, 2, dtype=torch.float64))
    assert counts == {True: len(branches), False: len(branches)}


@EXACT
def test_memory_does_not_grow_with_depth(exact):
    class Backwards(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.sequence = additive("reconstruct", exact, torch.float32, depth)

        def forward(self, z):
            return self.sequence.inv(z)

    memories = [measure_memory(Backwards(depth), torch.randn(4, 4, 16, 16)) for depth in (4, 8, 16)]
    assert len({memory.kept for memory in memories}) == 1
    peaks = [memory.peak for memory in memories]
    assert 0 < max(peaks) <= 1.01 * min(peaks)


def test_it_follows_the_sequence():
    sequence = mixed()
    plan = ["store"] * 3 + ["reconstruct"] * 6
    sequence.activations = plan
    inverted = sequence.inv
    assert inverted.activations == tuple(reversed(plan))
    assert inverted.watch is sequence.watch
    assert {id(p) for p in inverted.parameters()} == {id(p) for p in sequence.parameters()}
    assert sequence.inv is inverted
    sequence.append(Twice().double())
    sequence.activations = "store"
    assert len(sequence.inv) == len(sequence)
    assert not any("inv" in key for key in sequence.state_dict())


def test_the_inverted_sequence_inverted_is_made_of_the_layers():
    sequence = ReversibleSequence([Twice(), mixed()])
    assert sequence.inv.inv[0] is sequence[0]
    assert list(sequence.inv.inv[1]) == list(sequence[1])
    sequence[1].activations = "store"
    assert sequence.inv[0].activations == "store"


def test_a_copy_has_an_inverse_of_its_own():
    sequence = mixed()
    original = sequence.inv
    copied = copy.deepcopy(sequence)
    assert copied.inv is not original
    assert {id(p) for p in copied.inv.parameters()} == {id(p) for p in copied.parameters()}


def test_a_layer_without_an_inverse_is_named():
    with pytest.raises(ValueError, match="Transition cannot be inverted"):
        _ = ReversibleSequence([Transition(4)]).inv
    with pytest.raises(ValueError, match="Transition cannot be inverted"):
        ReversibleSequence([ReversibleSequence([Transition(4)])]).inverse(torch.randn(1, 4))
    with pytest.raises(ValueError, match="ReLU cannot be inverted"):
        invert(nn.ReLU())


def test_a_rule_without_an_inverse_is_named():
    class Rule:
        def move(self, x, h):
            return x + h, None

        def undo(self, y, h, out=None):
            return y - h

    class Own(AdditiveCoupling):
        def steps(self):
            return (Step(self.branch, 0, Rule()),)

    with pytest.raises(TypeError, match="Rule has no `inverse`"):
        invert(Own(nn.Identity()))(*torch.randn(2, 3, 4))


def test_a_part_called_inv_is_no_inverse():
    class WithInv(Twice):
        def __init__(self):
            super().__init__()
            self.inv = nn.Identity()

    class WithProperty(Twice):
        @property
        def inv(self):
            return torch.eye(2)

    for layer in (WithInv(), WithProperty()):
        sequence, x = ReversibleSequence([layer]), torch.randn(2, 3)
        torch.testing.assert_close(sequence.inv(sequence(x)), x)
