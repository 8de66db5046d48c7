"""Inputs, frozen parts, the modes without gradients, memory formats and outputs that are left unused."""

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequence
from revnet.profiling import MemoryTimeline
from tests.reversible.networks import EVERY, EXACT, MODES, blocks, same, sequence, step


@pytest.fixture
def x():
    return torch.randn(3, 8, 4, 4, dtype=torch.float64)


@MODES
def test_a_relu_before_the_sequence_and_an_input_used_elsewhere_get_the_gradients_of_store(activations, exact, x):
    def gradients(value):
        net, leaf = sequence(value, exact=exact), x.clone().requires_grad_()
        h = nn.functional.relu(leaf)
        y = net(h)
        (y * h + h.exp()).sum().backward()
        return [leaf.grad, *(p.grad for p in net.parameters())]

    assert same(gradients(activations), gradients("store"), exact)


@MODES
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, 4:12],
        lambda x: x.transpose(2, 3)[:, :8],
        lambda x: x[:1, :8].expand(3, -1, -1, -1),
    ],
    ids=["every other channel", "channels in the middle", "transposed", "expanded"],
)
def test_an_input_that_is_a_view_or_not_contiguous_gets_the_gradients_of_store(activations, exact, view):
    base = torch.randn(3, 16, 4, 4, dtype=torch.float64)

    def gradients(value):
        net, leaf = sequence(value, exact=exact), base.clone().requires_grad_()
        net(view(leaf)).square().sum().backward()
        return [leaf.grad, *(p.grad for p in net.parameters())]

    assert same(gradients(activations), gradients("store"), exact)


@MODES
def test_inputs_are_neither_changed_nor_freed(activations, exact):
    halves = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    before = halves.clone()
    x1, x2 = (x.requires_grad_() for x in halves.unbind())
    versions = x1._version, x2._version
    y1, y2 = ReversibleSequence(blocks(3, 4), activations, exact)(x1, x2)
    (y1 * y2).sum().backward()
    assert (x1._version, x2._version) == versions
    assert torch.equal(halves, before)


@MODES
def test_one_tensor_given_as_both_halves_gets_the_sum_of_their_gradients(activations, exact):
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)

    def results(value):
        net, leaf = ReversibleSequence(blocks(2, 4), value, exact), x.clone().requires_grad_()
        y1, y2 = net(leaf, leaf)
        return torch.autograd.grad((y1.exp() * y2).sum(), [leaf, *net.parameters()])

    assert same(results(activations), results("store"), exact)


@MODES
def test_frozen_parameters_get_no_gradient_and_the_others_that_of_store(activations, exact, x):
    def gradients(value):
        net = sequence(value, exact=exact)
        for block in (net[1], net[3]):
            block.requires_grad_(False)
        net[2].f[2].weight.requires_grad_(False)
        _, found = step(net, x)
        assert [g is None for g in found[1:]] == [not p.requires_grad for p in net.parameters()]
        return found

    assert same(gradients(activations), gradients("store"), exact)


@MODES
def test_images_without_grad_as_input_give_the_gradients_of_store(activations, exact, x):
    def gradients(value):
        net = sequence(value, exact=exact)
        net(x).square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert same(gradients(activations), gradients("store"), exact)
    assert x.grad is None


@MODES
@pytest.mark.parametrize("needed", [0, 1])
def test_one_half_alone_that_requires_grad_gets_the_gradient_of_store(activations, exact, needed):
    halves = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)

    def gradients(value):
        net, leaves = ReversibleSequence(blocks(2, 4), value, exact), [x.clone() for x in halves]
        leaves[needed].requires_grad_()
        y1, y2 = net(*leaves)
        (y1 * y2).sum().backward()
        return [x.grad for x in leaves] + [p.grad for p in net.parameters()]

    found, truth = gradients(activations), gradients("store")
    assert found[1 - needed] is None
    assert same(found, truth, exact)


@MODES
def test_a_frozen_prefix_keeps_nothing_and_is_not_evaluated_again(activations, exact, x):
    net, calls = sequence(activations, exact=exact), []
    net[1].requires_grad_(False)
    net[2].requires_grad_(False)
    for block in (net[2], net[3]):
        block.f.register_forward_hook(lambda *_, block=block: calls.append(block))
    with MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
        y = net(x)
        kept = timeline.live()
    # The output, a sample where reconstruction begins, the input of each block that is recomputed.
    blocks_behind = 2 if activations == "recompute" else 0
    assert 0 <= kept - (1 + blocks_behind) * y.nbytes < y.nbytes
    y.sum().backward()
    assert (calls.count(net[2]), calls.count(net[3])) == (1, 2)
    assert net[3].f[2].weight.grad is not None


@EXACT
@EVERY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_without_gradients_nothing_is_kept_and_the_output_is_bit_equal(activations, exact, mode, training, x):
    truth = sequence("store", exact=exact).train(training)(x)
    net = sequence(activations, exact=exact).train(training)
    with mode(), MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
        y = net(x)
    assert timeline.live() == y.untyped_storage().nbytes()
    assert not y.requires_grad
    assert torch.equal(y, truth)


@EXACT
def test_backward_under_inference_mode_gives_the_gradients_of_store(exact, x):
    found, truth = (sequence(activations, exact=exact) for activations in ("reconstruct", "store"))
    for net in (found, truth):
        loss = net(x).square().mean()
        with torch.inference_mode():
            loss.backward()
    errors = [(p.grad - q.grad).abs().max() for p, q in zip(found.parameters(), truth.parameters(), strict=True)]
    assert max(errors) <= (0 if exact else 1e-10)


@MODES
def test_backward_in_eval_mode_gives_the_gradients_of_store(activations, exact, x):
    (y, truth), (z, found) = (step(sequence(value, exact=exact).eval(), x) for value in ("store", activations))
    assert torch.equal(y, z)
    assert same(found, truth, exact)


@EXACT
@EVERY
@pytest.mark.parametrize(
    ("memory_format", "kind", "extent"),
    [(torch.channels_last, nn.Conv2d, (6, 6)), (torch.channels_last_3d, nn.Conv3d, (2, 3, 4))],
    ids=["images", "volumes"],
)
def test_channels_last_stays_channels_last_forward_and_backward(activations, exact, memory_format, kind, extent):
    formats = []

    def look(tensor):
        formats.append(tensor.is_contiguous(memory_format=memory_format))

    class Looks(kind):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

        def forward(self, x):
            look(x)
            if x.requires_grad:
                x.register_hook(look)
            return super().forward(x)

    net = sequence(activations, branch=Looks, dtype=torch.float32, exact=exact).to(memory_format=memory_format)
    x = torch.randn(2, 8, *extent).contiguous(memory_format=memory_format)
    y, (gradient, *_) = step(net, x, loss=lambda y: y.square().sum())
    assert len(formats) == (16 if activations == "store" else 24)
    assert all(formats)
    look(y)
    look(gradient)
    assert formats[-2:] == [True, True]


USES = {
    "the first half alone": lambda y1, y2: y1.square(),
    "the second half alone": lambda y1, y2: y2.square(),
    "each twice": lambda y1, y2: y1 * y2.exp() + y1.sin() * y2,
    "one twice, one detached": lambda y1, y2: y1.square() + y1.exp() * y2.detach(),
}


@MODES
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_outputs_left_unused_or_used_twice_give_the_gradients_of_store(activations, exact, use):
    halves = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)

    def gradients(value):
        net, leaves = ReversibleSequence(blocks(2, 4), value, exact), [x.clone().requires_grad_() for x in halves]
        use(*net(*leaves)).sum().backward()
        return [*(x.grad for x in leaves), *(p.grad for p in net.parameters())]

    assert same(gradients(activations), gradients("store"), exact)


@MODES
def test_an_output_that_no_loss_uses_gives_no_gradient(activations, exact, x):
    x.requires_grad_()
    net = sequence(activations, exact=exact)
    other = net(x)
    (x * 2).sum().backward()
    assert other.requires_grad
    assert torch.equal(x.grad, torch.full_like(x, 2))
    assert all(p.grad is None for p in net.parameters())


@MODES
def test_a_context_from_inference_mode_gives_the_gradients_of_store(activations, exact):
    """As features of a frozen encoder."""

    class Joined(nn.Linear):
        def forward(self, x, context):
            return super().forward(torch.cat((x, context), 1))

    with torch.inference_mode():
        context = torch.randn(4, 3, dtype=torch.float64)
    found, halves = [], torch.randn(2, 4, 3, dtype=torch.float64)
    for value in (activations, "store"):
        torch.manual_seed(0)
        branches = (Joined(6, 3, dtype=torch.float64) for _ in range(2))
        net = ReversibleSequence([ReversibleBlock(*branches)], value, exact)
        sum(y.square().sum() for y in net(*halves, context=context)).backward()
        found.append([p.grad for p in net.parameters()])
    assert same(*found, exact)


@MODES
def test_buffers_that_require_grad_make_a_layer_trainable(activations, exact):
    """As weights that a hypernetwork has made: nothing ahead of them is kept, they are reconstructed."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.rand(8, 1, 1, dtype=torch.float64, requires_grad=True))

        def forward(self, x):
            return x.tanh() * self.scale

    net = ReversibleSequence([ReversibleBlock(Scaled(), Scaled()) for _ in range(3)], activations, exact)
    y1, y2 = net(*torch.randn(2, 3, 8, 4, 4, dtype=torch.float64))
    names = {type(y1.grad_fn).__name__, type(y2.grad_fn).__name__}
    assert names == {"_ReversibleFunctionBackward"} or activations == "recompute"
    (y1 * y2).sum().backward()
    assert all(buffer.grad is not None for buffer in net.buffers())
