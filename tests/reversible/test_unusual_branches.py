"""Branches that do what few do: their gradients are those of ordinary backpropagation all the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import AdditiveCoupling, ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split
from tests.reversible.networks import EVERY, EXACT, MODES, same

C = 6


def linear():
    return nn.Linear(C, C, dtype=torch.float64)


def halves(batch=4):
    return [torch.randn(batch, C, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def blocks_of(branch, activations, exact, count=2):
    torch.manual_seed(1)
    return ReversibleSequence([ReversibleBlock(branch(), branch()) for _ in range(count)], activations, exact)


def loss(outputs):
    return sum((y * y).sum() for y in outputs)


def gradients(network, inputs):
    loss(network(*inputs)).backward()
    return [t.grad for t in (*network.parameters(), *inputs)]


def assert_as_store(branch, activations, exact, batch=4):
    inputs = halves(batch)
    found, truth = (
        gradients(blocks_of(branch, value, exact), [x.detach().requires_grad_() for x in inputs])
        for value in (activations, "store")
    )
    assert same(found, truth, exact)


class Positions(nn.Module):
    """Adds parameters of the shape of the whole half: their gradients are that of the half itself."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Parameter(torch.randn(4 * C, dtype=torch.float64))
        self.table = nn.Parameter(torch.randn(4, C, dtype=torch.float64))

    def forward(self, x):
        return x.tanh() + self.flat.view(4, C) + self.table


@EVERY
@EXACT
def test_no_two_gradients_share_memory(activations, exact):
    network, inputs = blocks_of(Positions, activations, exact), halves()
    gradients(network, inputs)
    storages = [t.grad.untyped_storage().data_ptr() for t in (*network.parameters(), *inputs)]
    assert len(set(storages)) == len(storages)


@EVERY
@EXACT
def test_gradients_that_equal_one_another_accumulate_and_are_clipped_once(activations, exact):
    network, inputs = blocks_of(Positions, activations, exact), halves()
    for _ in range(3):
        loss(network(*inputs)).backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    reference = blocks_of(Positions, "store", exact)
    once = torch.autograd.grad(loss(reference(*inputs)), list(reference.parameters()))
    for parameter, gradient in zip(network.parameters(), once, strict=True):
        assert torch.allclose(parameter.grad * norm, 3 * gradient, rtol=1e-5)


@EXACT
def test_micro_batches_of_one_with_positions_behind_each_other(exact):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = linear()
            self.positions = nn.Parameter(torch.zeros(1, 5, C, dtype=torch.float64))

        def forward(self, x):
            return self.mix(x).tanh() + self.positions

    def network(activations):
        torch.manual_seed(2)
        layers = [AdditiveCoupling(Tokens()), AdditiveCoupling(Tokens()), AdditiveCoupling(Tokens(), swap=True)]
        return ReversibleSequence([Split(-1), *layers, Merge(-1)], activations, exact)

    batches = [torch.randn(1, 5, 2 * C, dtype=torch.float64) for _ in range(3)]
    found = []
    for activations in ("recompute", "reconstruct", "store"):
        net = network(activations)
        for batch in batches:
            net(batch).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-9) for few in found[:2] for a, b in zip(few, found[2], strict=True))


class Hyper(nn.Module):
    """Its weight is made by another network and stands in a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.register_buffer("weight", None)

    def forward(self, x):
        return F.linear(self.inner(x).tanh(), self.weight)


@MODES
def test_a_buffer_that_requires_grad_gets_the_gradient_of_store(activations, exact):
    torch.manual_seed(0)
    code, inputs = torch.randn(3, dtype=torch.float64), halves()
    found = []
    for value in (activations, "store"):
        network = blocks_of(Hyper, value, exact)
        torch.manual_seed(3)
        maker = nn.Linear(3, C * C, dtype=torch.float64)
        for block in network:
            block.f.weight = block.g.weight = maker(code).view(C, C)
        loss(network(*inputs)).backward()
        found.append([p.grad for p in (*maker.parameters(), *network.parameters())])
    assert all(gradient is not None for gradient in found[0])
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9)
    assert same(found[0][2:], found[1][2:], exact)


@EXACT
def test_a_tensor_that_is_used_from_the_second_step_on_is_found_too(exact):
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()
            self.hidden = [torch.ones(C, dtype=torch.float64)]

        def forward(self, x):
            return self.inner(x) * self.hidden[0]

    network = blocks_of(Later, "reconstruct", exact)
    gradients(network, halves())
    network[0].f.hidden[0].requires_grad_()
    with pytest.raises(TypeError, match=r"uses a tensor of shape \(6,\) that requires grad and is none of its"):
        gradients(network, halves())


class KeepsVariable(torch.autograd.Function):
    """Notes its input under a name that torch's own nodes use for a leaf."""

    @staticmethod
    def forward(ctx, x):
        ctx.variable = x.detach()
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad


@MODES
def test_what_a_custom_function_keeps_is_not_taken_for_a_hidden_tensor(activations, exact):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            return KeepsVariable.apply(self.inner(x))

    assert_as_store(Branch, activations, exact)


@EXACT
@pytest.mark.parametrize(
    "register",
    [
        lambda block: block.register_forward_hook(lambda _, __, output: (output[0].detach(), output[1])),
        lambda block: block.register_forward_hook(lambda _, __, output: tuple(0.999 * y for y in output)),
        lambda block: block.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), inputs[1])),
    ],
    ids=["detaches the output", "scales the output", "detaches the input"],
)
def test_a_forward_hook_that_changes_a_reconstructed_block_is_refused(exact, register):
    network = blocks_of(linear, "reconstruct", exact)
    register(network[1])
    with pytest.raises(ValueError, match=r"forward hook of ReversibleBlock changes its input or output.*recompute"):
        network(*halves())


@EXACT
def test_a_forward_hook_that_looks_on_is_welcome(exact):
    network, seen = blocks_of(linear, "reconstruct", exact), []
    network[0].register_forward_hook(lambda _, __, output: seen.append(output[0].shape))
    inputs = halves()
    found = gradients(network, [x.detach().requires_grad_() for x in inputs])
    assert seen == [(4, C)]
    assert same(found, gradients(blocks_of(linear, "store", exact), inputs), exact)


def test_a_coupling_with_a_forward_of_its_own_is_refused_where_it_would_be_reconstructed():
    class Louder(AdditiveCoupling):
        def forward(self, x1, x2, context=None):
            y1, y2 = super().forward(x1, x2, context)
            return 1.0005 * y1, y2

    with pytest.raises(TypeError, match=r"Louder has a `forward` of its own"):
        ReversibleSequence([Louder(linear())])(*halves())
    ReversibleSequence([Louder(linear())], "recompute", exact=False)(*halves())


class SharedBuffer(nn.Module):
    """Two modules hold one buffer: one writes, the other reads."""

    class Writer(nn.Module):
        def forward(self, x):
            self.memory.lerp_(x.detach().mean(0), 0.5)
            return x

    class Reader(nn.Module):
        def forward(self, x):
            return x * self.memory

    def __init__(self):
        super().__init__()
        self.inner, self.writer, self.reader = linear(), self.Writer(), self.Reader()
        memory = torch.ones(C, dtype=torch.float64)
        self.writer.register_buffer("memory", memory)
        self.reader.register_buffer("memory", memory)

    def forward(self, x):
        return self.reader(self.writer(self.inner(x)))


class FilledAtFirst(nn.Module):
    """Its buffer is None until the first batch has filled it."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.register_buffer("mean", None)

    def forward(self, x):
        h = self.inner(x)
        if self.mean is None:
            self.mean = h.detach().mean(0)
        else:
            self.mean = torch.lerp(self.mean, h.detach().mean(0) + 1, 0.5)
        return h * self.mean


class Annotated(nn.Module):
    """Reads attributes of its parameters, as quantised layers do."""

    def __init__(self):
        super().__init__()
        self.frozen, self.trained = linear(), linear()
        self.frozen.weight.requires_grad_(False)
        self.frozen.weight.scale = 0.5
        self.trained.weight.scale = 0.25

    def forward(self, x):
        h = F.linear(x, self.frozen.weight * self.frozen.weight.scale)
        return F.linear(h, self.trained.weight * self.trained.weight.scale).tanh()


@MODES
@pytest.mark.parametrize("branch", [SharedBuffer, FilledAtFirst, Annotated])
def test_gradients_of_unusual_branches_are_those_of_store(activations, exact, branch):
    assert_as_store(branch, activations, exact)


@MODES
def test_a_sparse_gradient_and_a_dense_one_of_one_weight_are_summed(activations, exact):
    class Look(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, x):
            return self.table(torch.arange(len(x)) % 3)

    class Project(Look):
        def forward(self, x):
            return (x @ self.table.weight.T @ self.table.weight).tanh()

    inputs, found = halves(), []
    for value in (activations, "store"):
        for order in ((Look, Project), (Project, Look)):
            torch.manual_seed(1)
            table = nn.Embedding(3, C, sparse=True, dtype=torch.float64)
            network = ReversibleSequence([AdditiveCoupling(kind(table), swap) for kind in order for swap in (0, 1)])
            network.activations, network.exact = value, exact
            loss(network(*inputs)).backward()
            gradient = table.weight.grad
            found.append(gradient.to_dense() if gradient.is_sparse else gradient)
    assert torch.allclose(found[0], found[2], rtol=1e-7)
    assert torch.allclose(found[1], found[3], rtol=1e-7)


@MODES
def test_a_buffer_made_under_inference_mode(activations, exact):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()
            with torch.inference_mode():
                self.register_buffer("shift", torch.ones(C, dtype=torch.float64))

        def forward(self, x):
            return self.inner(x) + self.shift

    assert_as_store(Shifted, activations, exact)


@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_an_lstm_is_evaluated_as_where_it_gives_gradients(activations):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(64, 64, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    inputs = [torch.randn(4, 20, 64, requires_grad=True) for _ in range(2)]
    found, truth = (
        gradients(blocks_of(Recurrent, value, True), [x.detach().requires_grad_() for x in inputs])
        for value in (activations, "store")
    )
    assert same(found, truth, exact=True)


@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_the_sign_of_zero_is_that_of_store(activations):
    class Sign(nn.Module):
        def forward(self, x):
            return torch.copysign(torch.ones_like(x), x) * 0.5

    x1, x2 = torch.randn(4, C), -torch.zeros(4, C)
    outputs = [blocks_of(Sign, value, True)(x1.requires_grad_(), x2) for value in (activations, "store")]
    with torch.no_grad():
        outputs.append(blocks_of(Sign, activations, True)(x1, x2))
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))


def test_what_no_gradient_reaches_gets_none_as_under_store():
    torch.manual_seed(0)
    layers = [ReversibleBlock(linear(), linear()) for _ in range(2)]
    network = ReversibleSequence(layers, ["store", "reconstruct"], exact=True)
    network.forward_and_log_det(*halves())[1].sum().backward()  # a constant, but for its graph
    assert all(p.grad is None for p in network.parameters())


@MODES
def test_a_branch_that_sets_its_generator_back_draws_the_same_again(activations, exact):
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            with torch.random.fork_rng([]):
                return F.dropout(self.inner(x), 0.5)

    inputs = halves()
    found = []
    for value in (activations, "store"):
        network, own = blocks_of(Forked, value, exact), [x.detach().requires_grad_() for x in inputs]
        outputs = network(*own)
        torch.rand(7)  # something else draws between the passes
        loss(outputs).backward()
        found.append([t.grad for t in (*network.parameters(), *own)])
    assert same(*found, exact)


def test_evaluations_that_draw_nothing_share_one_copy_of_the_generators_state():
    outputs = blocks_of(linear, "reconstruct", True)(*halves())
    states = {id(e.random[0]) for evaluations in outputs[0].grad_fn.evaluations for e in evaluations}
    assert len(states) == 1


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = linear(), linear()


class SideChannel(Inner):
    """Leaves a loss of its own in an attribute."""

    def forward(self, x):
        h = self.first(x).tanh()
        self.loss = h.square().mean()
        return self.last(h.sigmoid())


class Differentiates(Inner):
    """A branch of the gradient of an energy."""

    def forward(self, x):
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.first(leaf).tanh().sum(), leaf, create_graph=True)
        return self.last(gradient)


class MixedTokens(nn.Module):
    """Products with strided tensors, which torch folds into one or not, depending on whether it needs a gradient."""

    def __init__(self):
        super().__init__()
        self.linear, self.weight = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x):
        return (self.linear(x.transpose(1, 2)) @ self.weight).transpose(1, 2).tanh()


@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_of_strided_tensors_have_the_same_bits_in_both_evaluations(activations, device):
    inputs, found = torch.randn(2, 4, 32, 16, device=device), []
    for value in (activations, "store"):
        network = blocks_of(MixedTokens, value, exact=True, count=4).to(device)
        found.append(gradients(network, [x.clone().requires_grad_() for x in inputs]))
    assert all(map(torch.equal, *found))
