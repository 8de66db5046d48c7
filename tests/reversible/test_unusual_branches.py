"""Branches that do what few do: their gradients are those of ordinary backpropagation all the same."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import AdditiveCoupling, ReversibleBlock, ReversibleSequence
from revnet.reversible import Coupling, Merge, Split, Step
from revnet.reversible.coupling import SUBTRACTION, Addition
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


class TimesContext(nn.Linear):
    """Scaled by the context, if there is any."""

    def __init__(self):
        super().__init__(C, C, dtype=torch.float64)

    def forward(self, x, context=None):
        return super().forward(x) if context is None else super().forward(x) * context


@EXACT
@pytest.mark.parametrize(
    "register",
    [
        lambda block: block.register_forward_hook(lambda _, __, output: (output[0].detach(), output[1])),
        lambda block: block.register_forward_hook(lambda _, __, output: tuple(0.999 * y for y in output)),
        lambda block: block.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), inputs[1])),
        lambda block: block.register_forward_pre_hook(lambda _, x, named: (x, {"context": None}), with_kwargs=True),
    ],
    ids=["detaches the output", "scales the output", "detaches the input", "takes the context away"],
)
def test_a_forward_hook_that_changes_a_reconstructed_block_is_refused(exact, register):
    network = blocks_of(linear, "reconstruct", exact)
    register(network[1])
    for block in network:
        block.f, block.g = TimesContext(), TimesContext()
    with pytest.raises(ValueError, match=r"forward hook of ReversibleBlock changes its input or output.*recompute"):
        network(*halves(), context=torch.ones(C, dtype=torch.float64))


@EXACT
def test_a_forward_hook_that_looks_on_is_welcome(exact):
    network, seen = blocks_of(linear, "reconstruct", exact), []
    network[0].register_forward_hook(lambda _, __, output: seen.append(output[0].shape))
    inputs = halves()
    found = gradients(network, [x.detach().requires_grad_() for x in inputs])
    assert seen == [(4, C)]
    assert same(found, gradients(blocks_of(linear, "store", exact), inputs), exact)


@EXACT
def test_hooks_of_a_block_may_run_its_inverse_and_other_blocks(exact):
    network, errors = blocks_of(linear, "reconstruct", exact), []
    (other,) = blocks_of(linear, "store", exact, 1)
    other.requires_grad_(False)

    def invert(block, inputs, outputs):
        other(*outputs)
        errors.extend((x - y).abs().max() for x, y in zip(inputs, block.inverse(*outputs), strict=True))

    network[0].register_forward_hook(invert)
    network[1].register_forward_pre_hook(lambda block, inputs: invert(block, block.inverse(*inputs), inputs))
    inputs = halves()
    found = gradients(network, [x.detach().requires_grad_() for x in inputs])
    assert same(found, gradients(blocks_of(linear, "store", exact), inputs), exact)
    assert max(errors) < 1e-12


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


class Memory(nn.Module):
    """Puts its result, with its graph, in the place of a buffer that it reads, as recurrent layers do."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.register_buffer("memory", torch.full((4, C), 0.3, dtype=torch.float64))

    def forward(self, x):
        self.memory = (self.inner(x) + self.memory).tanh()
        return self.memory


class Annotated(nn.Module):
    """Reads attributes of its parameters and of a buffer, as quantised layers do."""

    def __init__(self):
        super().__init__()
        self.frozen, self.trained = linear(), linear()
        self.frozen.weight.requires_grad_(False)
        self.frozen.weight.scale = 0.5
        self.trained.weight.scale = 0.25
        self.register_buffer("mask", torch.ones(C, dtype=torch.float64))
        self.mask.scale = 0.75

    def forward(self, x):
        x = x.tanh() * self.mask * getattr(self.mask, "scale", 1)
        h = F.linear(x, self.frozen.weight * self.frozen.weight.scale)
        return F.linear(h, self.trained.weight * self.trained.weight.scale).tanh()


class Averaged(nn.Module):
    """Writes to a buffer at the rate that is an attribute of it."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.register_buffer("mean", torch.zeros(C, dtype=torch.float64))
        self.mean.rate = 0.5

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), self.mean.rate)
        return self.inner(x - self.mean).tanh()


class RecomputesItself(torch.autograd.Function):
    """Evaluates its module again in its backward pass, whose gradients go straight to `.grad`."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        y.backward(gradient)
        return x.grad, None


class OwnCheckpoint(nn.Module):
    """Uses one of its weights outside of its checkpoint, too."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = linear(), linear()

    def forward(self, x):
        return self.outer(RecomputesItself.apply(self.inner(x).tanh(), self.outer)).sin()


@MODES
@pytest.mark.parametrize("branch", [SharedBuffer, FilledAtFirst, Annotated, Averaged, Memory, OwnCheckpoint])
def test_gradients_of_unusual_branches_are_those_of_store(activations, exact, branch):
    assert_as_store(branch, activations, exact)


def test_a_recomputed_memory_gives_the_gradients_of_store_through_time():
    inputs, found = halves(), []
    for activations in ("recompute", "store"):
        network = blocks_of(Memory, activations, False)
        outputs = network(*network(*(x.detach() for x in inputs)))
        loss(outputs).backward()
        found.append([p.grad for p in network.parameters()])
    assert same(*found, False)


@MODES
def test_a_buffer_with_a_gradient_that_a_branch_changes_in_place_is_refused(activations, exact):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(C, dtype=torch.float64, requires_grad=True))

        def forward(self, x):
            with torch.no_grad():
                self.scale.mul_(2)
            return x * self.scale

    network = blocks_of(Scaled, activations, exact)
    with pytest.raises(ValueError, match=r"Scaled changes its buffer 'scale', which requires grad, in place"):
        network(*halves())


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
def test_a_recurrent_layer_finds_the_weights_that_it_has_listed(activations, monkeypatch):
    """Else it lists them anew, and moves them to other memory on CUDA."""

    class Recurrent(nn.GRU):
        def forward(self, x):
            return super().forward(x)[0]

    network = blocks_of(lambda: Recurrent(C, C), activations, True)
    anew = []
    monkeypatch.setattr(nn.GRU, "_init_flat_weights", anew.append)
    for _ in range(2):
        loss(network(*torch.randn(2, 4, 5, C))).backward()
    assert anew == []
    assert all(a is b for a, b in zip(network[0].f._flat_weights, network[0].f.parameters(), strict=True))


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
    states = {id(e.random[0]) for evaluations in outputs[0].grad_fn.evaluations for _, e in evaluations}
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


class BiasedAttention(Inner):
    """torch chooses another kernel for it where it need give no gradients."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

    def forward(self, x):
        h = self.first(x)[None, None]
        return self.last(F.scaled_dot_product_attention(h, h, h, attn_mask=self.bias)[0, 0])


@EXACT
@pytest.mark.parametrize("branch", [SideChannel, Differentiates, BiasedAttention])
def test_what_cannot_be_reconstructed_is_recomputed_with_the_gradients_of_store(branch, exact):
    inputs, found = halves(batch=8), []
    for activations in ("store", "recompute"):
        network, own = blocks_of(branch, activations, exact), [x.detach().requires_grad_() for x in inputs]
        total = loss(network(*own)) + sum(m.loss for m in network.modules() if isinstance(m, SideChannel))
        total.backward()
        found.append([t.grad for t in (*network.parameters(), *own)])
    assert all(map(torch.equal, *found))


class DifferentiatesWhatItDraws(nn.Module):
    """Draws and counts ahead of the gradient that it takes within itself."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(C, dtype=torch.float64), linear()

    def forward(self, x):
        energy = F.dropout(self.inner(self.norm(x)), 0.5).tanh().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


@EXACT
def test_a_recomputed_branch_that_differentiates_inside_itself_draws_and_counts_once(exact):
    inputs, found = halves(), []
    for activations in ("store", "recompute"):
        network = blocks_of(DifferentiatesWhatItDraws, activations, exact)
        own = [x.detach().requires_grad_() for x in inputs]
        torch.manual_seed(3)
        outputs = network(*own)
        loss(outputs).backward()
        found.append([*outputs, *(t.grad for t in (*network.parameters(), *own)), *network.buffers(), torch.rand(3)])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


class Scaled(nn.Module):
    """Its weights have the shape of what is computed with them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, C), 2.0, dtype=torch.float64))

    def forward(self, x):
        return (x * self.weight).sin()


@MODES
@pytest.mark.parametrize("trained", [False, True], ids=["unfrozen", "frozen"])
def test_a_parameter_that_is_frozen_or_unfrozen_between_the_passes(activations, exact, trained):
    inputs, found = halves(), []
    for value in (activations, "store"):
        network, own = blocks_of(Scaled, value, exact), [x.detach().requires_grad_() for x in inputs]
        network.requires_grad_(trained)
        total = loss(network(*own))
        network.requires_grad_(not trained)
        total.backward()
        found.append([x.grad for x in own])
    assert same(*found, exact)


@MODES
def test_a_forward_pass_that_raises_leaves_nothing_behind(activations, exact):
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            self.inner(x)
            raise ArithmeticError("planned")

    with pytest.raises(ArithmeticError, match="planned") as caught:
        blocks_of(Raises, activations, exact)(*halves())
    weight = torch.ones(3, requires_grad=True)
    weight.square().sum().backward()  # while the exception is held, and with it the frames that it came through
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert caught.value is not None


class HoldsStatistics(nn.Module):
    """Normalises with what its BatchNorm holds, without calling it, as fused operations do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(C, dtype=torch.float64)

    def forward(self, x):
        norm = self.norm
        running = norm.running_mean, norm.running_var
        return F.batch_norm(x, *running, norm.weight, norm.bias, norm.training, norm.momentum).tanh()


class ReadsStatistics(HoldsStatistics):
    """Reads the running variance in training, then moves it, as batch renormalisation does."""

    def forward(self, x):
        variance, mean = torch.var_mean(x, 0, unbiased=False)
        ratio = (variance / self.norm.running_var).sqrt().detach()
        with torch.no_grad():
            self.norm.running_var.lerp_(variance, 0.5)
        return ((x - mean) / (variance + 1e-5).sqrt() * ratio * self.norm.weight + self.norm.bias).tanh()


def instance_norm():
    norm = nn.InstanceNorm1d(C, affine=True, track_running_stats=True, dtype=torch.float64)
    return nn.Sequential(
        nn.Unflatten(1, (C, 1)), nn.ConstantPad1d((0, 3), 1.0), norm, nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )


@pytest.mark.parametrize("branch", [HoldsStatistics, ReadsStatistics, instance_norm])
@MODES
def test_statistics_that_a_branch_reads_itself_count_once_and_give_the_gradients_of_store(branch, activations, exact):
    found = []
    for value in (activations, "store"):
        network = blocks_of(branch, value, exact)
        torch.manual_seed(2)
        inputs = halves()
        for _ in range(2):
            gradients(network, inputs)
        found.append(([p.grad for p in network.parameters()], list(network.buffers())))
    (grads, buffers), (truth, expected) = found
    assert same(grads, truth, exact)
    assert same(buffers, expected, exact)


class OwnParameter(nn.Parameter):
    """A kind of parameter, as those on manifolds are."""


class HoldsOwnParameter(nn.Linear):
    def __init__(self):
        super().__init__(C, C, dtype=torch.float64)
        self.weight = OwnParameter(self.weight.detach().clone())

    def forward(self, x):
        assert type(self.weight) is OwnParameter
        return super().forward(x).tanh()


@MODES
def test_a_subclass_of_parameter_stays_one(activations, exact):
    assert_as_store(HoldsOwnParameter, activations, exact)


@MODES
def test_noise_that_is_saved_ahead_of_being_drawn_is_drawn_again(activations, exact):
    found = []
    for value in (activations, "store"):
        network, inputs = blocks_of(lambda: nn.Sequential(linear(), nn.RReLU(0.1, 0.9)), value, exact), halves()
        torch.manual_seed(3)
        for x in inputs:
            x.data = torch.randn(4, C, dtype=torch.float64)
        found.append(gradients(network, inputs))
    assert same(*found, exact)


class FoldedNorm(nn.Module):
    """A linear layer whose weight is scaled by the statistics of the normalisation behind it, ahead of their update."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = linear(), nn.BatchNorm1d(C, dtype=torch.float64)

    def forward(self, x):
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return self.norm(F.linear(x, (self.linear.weight * scale[:, None]).tanh()) / scale)


def fold(norm):
    return norm.weight / (norm.running_var + norm.eps).sqrt()


class FoldedByAFunction(FoldedNorm):
    def forward(self, x):
        scale = fold(self.norm)
        return self.norm(F.linear(x, (self.linear.weight * scale[:, None]).tanh()) / scale)


class FoldedByADecoratedProperty(FoldedNorm):
    @property
    @torch.no_grad()
    def scale(self):
        return (self.norm.running_var + self.norm.eps).rsqrt()

    def forward(self, x):
        return self.norm(self.linear(x) * self.scale)


class Gain(nn.BatchNorm1d):
    """A normalisation with a buffer of its own, which a hook reads and changes."""

    def __init__(self):
        super().__init__(C, dtype=torch.float64)
        self.register_buffer("gain", torch.ones(C, dtype=torch.float64))
        self.register_forward_hook(Gain.apply_gain)

    def apply_gain(self, inputs, output):
        result = output * self.gain.clone()
        self.gain.mul_(1.5)
        return result


class FoldedByTorch(nn.Module):
    """torch's own module for training with quantised weights, which folds its normalisation."""

    def __init__(self):
        super().__init__()
        qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        self.inner = torch.ao.nn.intrinsic.qat.ConvBn2d(C, C, 1, qconfig=qconfig)

    def forward(self, x):
        return self.inner(x[..., None, None].float())[..., 0, 0].double()


class UncountedStatistics(nn.Module):
    """Statistics in buffers, which `F.batch_norm` writes without autograd's counting it, and which are read."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.register_buffer("m", torch.zeros(C, dtype=torch.float64))
        self.register_buffer("v", torch.ones(C, dtype=torch.float64))

    def forward(self, x):
        x = self.inner(x)
        scale = (x.var(0) / self.v).sqrt().detach()
        return F.batch_norm(x, self.m, self.v, training=True) * scale


@EVERY
@EXACT
@pytest.mark.parametrize(
    "branch", [FoldedNorm, FoldedByAFunction, FoldedByADecoratedProperty, FoldedByTorch, Gain, UncountedStatistics]
)
def test_statistics_are_read_as_they_were_in_the_first_evaluation(branch, activations, exact):
    networks = [blocks_of(branch, value, exact) for value in (activations, "store")]
    for step in range(3):
        torch.manual_seed(step)
        inputs = [2 * x.detach() for x in halves()]
        found, truth = (gradients(network, [x.clone().requires_grad_() for x in inputs]) for network in networks)
        assert same(found, truth, exact)
        for network in networks:
            network.zero_grad()
    assert all(a.allclose(b) for a, b in zip(*(network.buffers() for network in networks), strict=True))
    assert any(buffer.ne(0).any() for buffer in networks[0].buffers())


@EVERY
def test_a_log_determinant_may_be_added_to_in_place(activations):
    (y1, y2), log_det = blocks_of(linear, activations, False).forward_and_log_det(*halves())
    log_det += y1.square().sum(1) + y2.square().sum(1)
    log_det.sum().backward()
    assert log_det.shape == (4,)


class Kick(Coupling):
    """y2 = x2 - f(x1), as in a leapfrog."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def steps(self):
        return (Step(self.f, 1, SUBTRACTION),)


class Half(Addition):
    """x + h / 2, with `gradient` as it was."""

    def move(self, x, h):
        return x + h / 2, None

    def undo(self, y, h, out=None):
        return torch.sub(y, h / 2, out=out)


class Product:
    """x + h M, which autocast narrows."""

    def __init__(self):
        self.matrix = torch.randn(C, C)

    def move(self, x, h):
        return x + h @ self.matrix, None

    def undo(self, y, h, out=None):
        return torch.sub(y, h @ self.matrix, out=out)


class Ruled(Coupling):
    """Moves the second half by a rule of one's own."""

    def __init__(self, rule):
        super().__init__()
        self.f, self.rule = nn.Linear(C, C), rule

    def steps(self):
        return (Step(self.f, 1, self.rule),)


@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
@pytest.mark.parametrize("rule", [Half, Product])
def test_a_rule_of_one_s_own_has_the_gradients_of_store(activations, rule):
    layer, inputs = Ruled(rule()), [x.detach().float() for x in halves()]
    found = []
    for value in (activations, "store"):
        layer.zero_grad()
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=rule is Product):
            outputs = ReversibleSequence([layer], value)(*leaves)
        loss(outputs).backward()
        found.append([x.grad for x in (*layer.parameters(), *leaves)])
    assert same(*found, True)


def test_a_rule_that_has_taken_over_another_s_inverse_is_not_inverted():
    with pytest.raises(TypeError, match="Half has no `inverse`"):
        ReversibleSequence([Ruled(Half())]).inv(*[x.float() for x in halves()])


class Skipped(Coupling):
    """Has steps in training mode alone, or as often as a coin says."""

    def __init__(self, toss=None):
        super().__init__()
        self.f, self.toss = linear(), toss

    def steps(self):
        taken = self.training if self.toss is None else next(self.toss)
        return (Step(self.f, 1, Addition()),) if taken else ()


@pytest.mark.parametrize("first", [True, False])
def test_the_steps_that_are_undone_are_those_of_the_forward_pass(first):
    network, (x1, x2) = ReversibleSequence([Skipped(), Skipped()], exact=False), halves()
    network(x1, x2)[1].sum().backward()  # finds the parameters in the branches
    network.zero_grad()
    x1.grad = x2.grad = None
    y1, y2 = network.train(first)(x1, x2)
    network.train(not first)
    loss((y1, y2)).backward()
    assert (network[0].f.weight.grad is not None) == first
    assert (x1.grad != 2 * x1).any() == first
    torch.testing.assert_close(x2.grad, 2 * y2)


def test_steps_are_asked_for_once():
    network, (x1, x2) = ReversibleSequence([Skipped(itertools.cycle([True, False]))], exact=False), halves()
    loss(network(x1, x2)).backward()
    assert network[0].f.weight.grad.abs().max() > 0


@EVERY
def test_a_subtraction_is_one_in_exact_mode_too(activations):
    f, (x1, x2) = linear().float(), [x.float() for x in halves()]
    network = ReversibleSequence([Kick(f)], activations)
    y1, y2 = network(x1, x2)
    torch.testing.assert_close(y2, x2 - f(x1), atol=2**-15, rtol=0)
    z1, z2 = network.inverse(y1, y2)
    assert z1.equal(y1)
    torch.testing.assert_close(z2, x2, atol=2**-15, rtol=0)


class Mixing(nn.Module):
    """An invertible layer that computes in half precision under autocast, on the way back too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(2 * C, 2 * C))[0])

    def forward(self, a, b):
        return (torch.cat((a, b), 1) @ self.weight).chunk(2, 1)

    def inverse(self, a, b):
        return (torch.cat((a, b), 1) @ self.weight.T).chunk(2, 1)


def test_the_stream_is_undone_in_full_precision_behind_a_layer_that_autocast_narrows():
    network = ReversibleSequence([AdditiveCoupling(linear().float()), Mixing()], exact=False)
    seen = []
    network[0].branch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(*(x.float() for x in halves()))
        assert [x.dtype for x in network.inverse(*(y.detach() for y in outputs))] == [torch.float32] * 2
    loss(outputs).backward()
    assert seen == [torch.float32] * len(seen)


def test_cached_parametrisations_elsewhere_leave_a_sequence_as_it_is():
    network, inputs = blocks_of(linear, "reconstruct", False), halves()
    with nn.utils.parametrize.cached():
        outputs = network(*inputs)
    assert "_ReversibleFunction" in type(outputs[0].grad_fn).__name__


class Film(nn.Module):
    """Modulated by buffers that are there for the forward pass alone."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.register_buffer("shift", None)
        self.register_buffer("scale", None)

    def forward(self, x):
        return self.inner(x).tanh() * self.scale + self.shift


@EVERY
@EXACT
@pytest.mark.parametrize("later", [None, torch.zeros(C, dtype=torch.float64)], ids=["none", "one for all"])
def test_buffers_that_become_one_and_the_same_between_the_passes_are_read_as_they_were(activations, exact, later):
    inputs, found = halves(), []
    for value in (activations, "store"):
        network = blocks_of(Film, value, exact)
        films = [module for module in network.modules() if isinstance(module, Film)]
        for number, film in enumerate(films):
            film.shift = torch.full((C,), 0.1 * number, dtype=torch.float64)
            film.scale = torch.full((C,), 0.5 + number, dtype=torch.float64)
        total = loss(network(*(x.detach() for x in inputs)))
        for film in films:
            film.shift = film.scale = later
        total.backward()
        found.append([p.grad for p in network.parameters()])
        assert all(film.shift is film.scale is later for film in films)
    assert same(*found, exact)


@EVERY
@EXACT
def test_a_buffer_in_two_places_stays_one_in_the_second_evaluation(activations, exact):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = linear(), nn.Module()
            self.register_buffer("count", torch.ones(C, dtype=torch.float64))
            self.other.register_buffer("count", self.count)

        def forward(self, x):
            self.count.add_(1)
            return self.inner(x).tanh() / self.other.count.clone()

    assert_as_store(Shared, activations, exact)


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
