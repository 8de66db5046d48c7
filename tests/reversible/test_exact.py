"""On the fixed-point grid the gradients equal those of store to the bit."""

import math

import pytest
import torch
from torch import nn

from revnet import AdditiveCoupling, AffineCoupling, ReversibleBlock, ReversibleSequence
from revnet.models import get_model
from revnet.reversible import Merge, Split, Watch
from revnet.reversible.drift import Sample
from revnet.reversible.grid import checksum, subtract_on_grid, to_grid
from tests.reversible.networks import BRANCHES, EVERY, EXACT, VALUES, Transition, blocks, sequence, step, tokens

MIX = ("reconstruct", "store", "recompute", "reconstruct")


def exact_step(activations, depth, branch, memory_format=torch.contiguous_format, autocast=False, dtype=torch.float32):
    net = sequence(activations, depth, 4, branch, dtype).to(memory_format=memory_format)
    net.exact = True
    x = torch.randn(4, 8, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(8))
    x = x.contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, gradients = step(net, x, loss=lambda y: y.float().square().mean())
    return y, gradients, net.reconstruction_error


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_gradients_are_bit_equal_to_exact_store(branch, memory_format, autocast):
    y, truth, _ = exact_step("store", 8, branch, memory_format, autocast)
    for activations in ("recompute", "reconstruct", ["reconstruct", *MIX * 2, "recompute"]):
        z, found, error = exact_step(activations, 8, branch, memory_format, autocast)
        assert torch.equal(y, z)
        assert all(map(torch.equal, found, truth))
        assert not error  # nothing is reconstructed under recompute, so nothing is measured


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_gradients_of_256_units_with_dropout_in_a_mixed_plan_are_bit_equal(autocast):
    branch = BRANCHES["dropout"]
    y, truth, _ = exact_step("store", 256, branch, autocast=autocast)
    for activations in ("reconstruct", ["reconstruct", *MIX * 64, "reconstruct"]):
        z, found, error = exact_step(activations, 256, branch, autocast=autocast)
        assert torch.equal(y, z)
        assert all(map(torch.equal, found, truth))
        assert error == 0


@pytest.mark.parametrize("name", ["revnet38", "revnet164"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_gradients_of_whole_networks_are_bit_equal(name, autocast):
    def gradients(activations):
        torch.manual_seed(0)
        network = get_model(name, activations=activations, exact=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return step(network, torch.randn(4, 3, 16, 16))[1]

    truth = gradients("store")
    for activations in ("recompute", "reconstruct"):
        assert all(map(torch.equal, gradients(activations), truth))


def test_inverse_gives_back_every_bit():
    net = sequence("reconstruct", 16, dtype=torch.float32)
    net.exact = True
    net.eval()
    x = to_grid(torch.randn(4, 8, 6, 6), torch.float32)
    assert torch.equal(net.inverse(net(x)), x)


class Constant(nn.Module):
    """Returns its parameter, whatever it is given."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x):
        return self.value.expand_as(x)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_inverse_is_exact_far_from_zero(sign):
    x = to_grid(-sign * torch.linspace(-50, 200, 4096), torch.float32)
    net = ReversibleSequence([AdditiveCoupling(Constant(sign * (99 + 2 * torch.rand(4096))))], exact=True)
    y1, y2 = net(x, x)
    (y1 + y2).sum().backward()
    assert torch.equal(net.inverse(y1, y2)[0], x)
    assert net.reconstruction_error == 0


@pytest.mark.parametrize("count", [1, 2, 8])
def test_values_beyond_the_range_are_seen_however_few(count):
    for _ in range(25):
        x1, x2 = to_grid(torch.randn(2, 16, 64), torch.float32)
        h, where = torch.randn(16, 64), torch.randperm(x1.numel())[:count]
        x1.view(-1)[where] = to_grid(220 + 30 * torch.rand(count), torch.float32)
        h.view(-1)[where] = 40 + 20 * torch.rand(count)
        net = ReversibleSequence([AdditiveCoupling(Constant(h))], exact=True)
        net.watch = Watch(math.inf, math.inf)
        y1, y2 = net(x1, x2)
        (y1 + y2).sum().backward()
        assert (net.reconstruction_error == 0) == torch.equal(net.inverse(y1, y2)[0], x1)


def test_float64_has_a_grid_of_its_own():
    _, truth, _ = exact_step("store", 8, BRANCHES["basic"], dtype=torch.float64)
    _, found, error = exact_step("reconstruct", 8, BRANCHES["basic"], dtype=torch.float64)
    assert all(map(torch.equal, found, truth))
    assert error == 0


def test_one_wrong_bit_anywhere_is_seen():
    state = (torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6))
    sample = Sample(state, exact=True)
    assert sample.error(state) == 0
    state[1].view(torch.int32)[3, 5, 1, 2] += 1
    assert sample.error(state) > 0
    assert torch.equal(checksum(state), checksum(tuple(x.contiguous(memory_format=torch.channels_last) for x in state)))


GRIDS = pytest.mark.parametrize(
    ("dtype", "step_size", "bound"), [(torch.float32, 2**-16, 256), (torch.float64, 2**-32, 2**21)]
)


@GRIDS
@pytest.mark.parametrize("size", [1, 2**-8])
def test_errors_that_cancel_in_a_plain_sum_are_seen(dtype, step_size, bound, size):
    torch.manual_seed(0)
    x = to_grid(size * (2.5 + torch.rand(4, 8, 6, 6, dtype=dtype)), dtype)
    sample, bits = Sample((x,), exact=True), {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    for _ in range(50):
        up, down = torch.randperm(x.numel())[:2]
        wrong = x.clone()
        wrong.view(-1)[up] += step_size
        wrong.view(-1)[down] -= step_size
        assert wrong.view(bits).sum() == x.view(bits).sum()
        assert not torch.equal(checksum((wrong,)), checksum((x,)))
        assert sample.error((wrong,)) > 0


@GRIDS
def test_the_two_zeros_are_one_state(dtype, step_size, bound):
    x = torch.zeros(3, 5, dtype=dtype)  # an odd number: an even one of sign bits would wrap around to 0
    assert Sample((x,), exact=True).error((-x,)) == 0


def test_a_difference_that_the_checksum_misses_is_reported_where_the_sample_has_it():
    x, wrong = torch.randn(2, 4, 8, 6, 6)
    sample = Sample((x,), exact=True)
    sample.checksum = checksum((wrong,))
    assert sample.error((wrong,)) == Sample((x,), exact=False).error((wrong,)) > 0


@GRIDS
def test_every_value_in_the_range_is_put_on_the_grid(dtype, step_size, bound):
    even = torch.linspace(-bound, bound, 100_001, dtype=dtype)[1:-1]
    h = torch.cat([even, bound * (2 * torch.rand(100_000, dtype=dtype) - 1), torch.tensor([1e-9, -1e-9, -0.0])])
    rounded = to_grid(h, dtype)
    assert torch.equal(rounded / step_size, (rounded / step_size).round())
    assert torch.equal(to_grid(rounded, dtype), rounded)
    assert (rounded - h)[h.abs() < bound / 2].abs().max() <= step_size / 2
    assert (rounded - h).abs().max() <= step_size
    with torch.no_grad():
        assert torch.equal(to_grid(h, dtype), rounded)


@GRIDS
def test_the_grid_has_the_step_and_the_range_that_are_documented(dtype, step_size, bound):
    h = torch.randn(1000, dtype=dtype) * 3
    rounded = to_grid(h, dtype)
    assert torch.equal(rounded / step_size, (h / step_size).round())
    assert (rounded - h).abs().max() <= step_size / 2
    top = torch.tensor(bound - step_size, dtype=dtype)
    assert (top + step_size) - step_size == top
    leaf = torch.randn(5, dtype=dtype, requires_grad=True)
    to_grid(leaf, dtype).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(5, dtype=dtype))


def test_the_output_of_a_layer_without_inverse_is_put_on_the_grid():
    def gradients(activations):
        torch.manual_seed(3)
        blocks = [ReversibleBlock(BRANCHES["basic"](4), BRANCHES["basic"](4)) for _ in range(4)]
        net = ReversibleSequence([Split(), *blocks[:2], Transition(4), *blocks[2:], Merge()], activations, exact=True)
        return step(net, torch.randn(4, 8, 6, 6))[1]

    assert all(map(torch.equal, gradients("reconstruct"), gradients("store")))


def test_a_layer_without_inverse_may_turn_words_into_the_stream():
    words = torch.randint(10, (4, 6))

    def gradients(activations):
        torch.manual_seed(3)
        layers = [nn.Embedding(10, 8), Split(-1), *blocks(3, 4, tokens, torch.float32), Merge(-1)]
        net = ReversibleSequence(layers, activations, exact=True)
        net(words).square().sum().backward()
        return [p.grad for p in net.parameters()], net.reconstruction_error

    truth, _ = gradients("store")
    for activations in VALUES[1:]:
        found, error = gradients(activations)
        assert all(map(torch.equal, found, truth))
        assert not error


class Shuffle(nn.Conv2d):
    """A map without an inverse that knows its log-determinant."""

    def forward_and_log_det(self, x):
        return self(x), x.new_ones(x.shape[0])


@EVERY
def test_the_output_beside_a_log_determinant_is_on_the_grid_too(activations):
    layers = [Shuffle(8, 8, 1), Split(), *blocks(2, 4, dtype=torch.float32), Merge()]
    net, x = ReversibleSequence(layers, activations, exact=True), torch.randn(4, 8, 6, 6)
    y, log_det = net.forward_and_log_det(x)
    assert torch.equal(y, net(x))
    assert torch.equal(log_det, torch.ones(4))
    (y.square().sum() + log_det.sum()).backward()
    assert not net.reconstruction_error


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


@EXACT
@pytest.mark.parametrize(
    "branch",
    [lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: Attention(8, 2, batch_first=True)],
    ids=["layer", "attention"],
)
def test_transformer_layers_in_eval_mode_are_evaluated_as_where_they_give_gradients(exact, branch):
    def results(activations):
        torch.manual_seed(3)
        net = ReversibleSequence([ReversibleBlock(branch(), branch()) for _ in range(3)], activations, exact).eval()
        y1, y2 = net(*torch.randn(2, 3, 5, 8))
        (y1 * y2).sum().backward()
        return [y1, y2], [p.grad for p in net.parameters()]

    outputs, truth = results("store")
    for activations in VALUES[1:]:
        found, gradients = results(activations)
        assert all(map(torch.equal, found, outputs))
        assert not exact or all(map(torch.equal, gradients, truth))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_by_default_a_float32_stream_of_additions_is_exact(autocast):
    def results(activations, exact=None):
        torch.manual_seed(3)
        body = [*blocks(2, 4, dtype=torch.float32), Transition(4), AdditiveCoupling(BRANCHES["basic"](4), swap=True)]
        net = ReversibleSequence([Split(), *body, Merge()], activations, exact)
        x = torch.randn(4, 8, 6, 6, dtype=torch.bfloat16 if autocast else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, gradients = step(net, x)
        assert net[1].exact == (exact is not False)
        assert not net.reconstruction_error
        return [y, *gradients]

    truth = results("store")
    assert all(map(torch.equal, truth, results("store", exact=True)))
    # In bf16 the branches return multiples of the grid's step anyway.
    assert autocast or not torch.equal(truth[0], results("store", exact=False)[0])
    for activations in VALUES[1:]:
        assert all(map(torch.equal, results(activations), truth))


class Twice(nn.Module):
    """A user's own bijection."""

    def forward(self, x1, x2):
        return 2 * x1, 2 * x2

    def inverse(self, y1, y2):
        return y1 / 2, y2 / 2


class Affine(nn.Conv2d):
    def forward(self, x):
        log_scale, shift = super().forward(x).chunk(2, dim=1)
        return log_scale.tanh(), shift


INEXACT = {
    "float64": lambda: [Split(), *blocks(2, 4), Merge()],
    "affine": lambda: [Split(), *blocks(1, 4, dtype=torch.float32), AffineCoupling(Affine(4, 8, 1)), Merge()],
    "user's": lambda: [Split(), *blocks(1, 4, dtype=torch.float32), Twice(), Merge()],
    "no couplings": lambda: [nn.Conv2d(8, 8, 1), Split(), Transition(4), Merge()],
}


@EVERY
@pytest.mark.parametrize("layers", INEXACT.values(), ids=INEXACT)
def test_by_default_every_other_stream_is_in_floating_point(activations, layers):
    def results(exact):
        torch.manual_seed(3)
        net = ReversibleSequence(layers(), activations, exact)
        x = torch.randn(4, 8, 6, 6, dtype=next(net.parameters()).dtype)
        y, gradients = step(net, x)
        return [y, *gradients]

    assert all(map(torch.equal, results(None), results(False)))


def test_networks_of_either_kind_by_default():
    def results(name, activations, exact):
        torch.manual_seed(3)
        y, gradients = step(get_model(name, activations=activations, exact=exact), torch.randn(4, 3, 16, 16))
        return [y, *gradients]

    truth = results("revnet38", "store", None)
    for activations in VALUES[1:]:
        assert all(map(torch.equal, results("revnet38", activations, None), truth))
    assert all(map(torch.equal, results("resnet32", "recompute", None), results("resnet32", "store", False)))


@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 9), (11,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subtraction_in_place_and_in_pieces_is_the_same(shape, dtype, monkeypatch):
    y, h = to_grid(torch.randn(shape), torch.float32), torch.randn(shape).to(dtype)
    expected = subtract_on_grid(y, h)
    monkeypatch.setattr("revnet.reversible.grid.PIECE", 4)
    assert subtract_on_grid(y, h, out=y) is y
    assert torch.equal(y, expected)
