"""Plans, switches, inputs and misuse of sequences."""

import math

import pytest
import torch
from torch import nn

from revnet import AdditiveCoupling, AffineCoupling, ReversibleBlock, ReversibleSequence, set_activations
from revnet.reversible import Coupling, Merge, ReconstructionError, ReconstructionWarning, Split, Watch
from tests.reversible.networks import BRANCHES, basic, blocks, relative, sequence, step
from tests.reversible.test_memory import Transition

VALUES = ("store", "recompute", "reconstruct")


@pytest.mark.parametrize("activations", VALUES[1:])
def test_a_relu_before_the_sequence_and_an_input_used_elsewhere(activations):
    def gradients(value):
        net = sequence(value)
        x = torch.linspace(-1, 1, 3 * 8 * 16, dtype=torch.float64).view(3, 8, 4, 4).requires_grad_()
        h = nn.functional.relu(x)
        before = h.detach().clone()
        y = net(h)
        (y * h + h.exp()).sum().backward()
        assert torch.equal(h, before)
        return [x.grad, *(p.grad for p in net.parameters())]

    assert relative(gradients(activations), gradients("store")) <= 1e-10


@pytest.mark.parametrize("activations", VALUES[1:])
@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x[:, 4:12], lambda x: x.transpose(2, 3)[:, :8]])
def test_an_input_that_is_a_view_or_not_contiguous(activations, view):
    base = torch.randn(3, 16, 4, 4, dtype=torch.float64)

    def gradients(value):
        net = sequence(value)
        x = base.clone().requires_grad_()
        net(view(x)).square().sum().backward()
        return [x.grad, *(p.grad for p in net.parameters())]

    kept = base.clone()
    assert relative(gradients(activations), gradients("store")) <= 1e-10
    assert torch.equal(base, kept)


@pytest.mark.parametrize("activations", VALUES[1:])
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(activations):
    def gradients(value):
        net = sequence(value, depth=4)
        for block in (net[1], net[3]):
            block.requires_grad_(False)
        net[2].f[2].weight.requires_grad_(False)
        return step(net, torch.ones(2, 8, 4, 4, dtype=torch.float64).cumsum(3).cumsum(1))[1]

    found, truth = gradients(activations), gradients("store")
    assert [g is None for g in found] == [g is None for g in truth]
    assert any(g is None for g in found)
    assert relative([g for g in found if g is not None], [g for g in truth if g is not None]) <= 1e-10


@pytest.mark.parametrize("activations", VALUES[1:])
def test_images_without_grad_as_input(activations):
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)

    def gradients(value):
        net = sequence(value)
        net(x).square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert relative(gradients(activations), gradients("store")) <= 1e-10
    assert x.grad is None


def test_only_one_half_requires_grad():
    def gradients(value):
        net = ReversibleSequence(blocks(2, 4), value)
        x1, x2 = (torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 4, 4, 4) for _ in range(2))
        x2.requires_grad_()
        y1, y2 = net(x1, x2)
        (y1 * y2).sum().backward()
        assert x1.grad is None
        return [x2.grad, *(p.grad for p in net.parameters())]

    assert relative(gradients("reconstruct"), gradients("store")) <= 1e-10


def test_a_frozen_prefix_keeps_nothing_and_is_not_evaluated_again():
    net = sequence("reconstruct", depth=4)
    net[1].requires_grad_(False)
    net[2].requires_grad_(False)
    calls = []
    net[1].f.register_forward_hook(lambda *_: calls.append(1))
    step_free = net(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    step_free.sum().backward()
    assert len(calls) == 1
    assert net[3].f[2].weight.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept_and_the_output_is_equal(mode):
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    truth = sequence("store")(x)
    net = sequence("reconstruct")
    with mode():
        y = net(x)
    assert y.grad_fn is None
    assert torch.equal(y, truth)


@pytest.mark.parametrize("activations", VALUES[1:])
def test_backward_in_eval_mode(activations):
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    y, truth = step(sequence("store").eval(), x)
    z, found = step(sequence(activations).eval(), x)
    assert torch.equal(y, z)
    assert relative(found, truth) <= 1e-10


@pytest.mark.parametrize("activations", VALUES)
def test_channels_last_stays_channels_last(activations):
    formats = []

    class Watch(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

        def forward(self, x):
            formats.append(x.is_contiguous(memory_format=torch.channels_last))
            if x.requires_grad:
                x.register_hook(lambda g: formats.append(g.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(x)

    net = sequence(activations, branch=Watch, dtype=torch.float32).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = net(x)
    y.square().sum().backward()
    assert len(formats) >= 16
    assert all(formats)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_the_three_values_load_each_others_weights():
    states = {value: sequence(value).state_dict() for value in VALUES}
    for value in VALUES:
        for state in states.values():
            sequence(value).load_state_dict(state, strict=True)


def test_reconstruction_error_is_measured_and_sees_an_exploding_branch():
    net = sequence("reconstruct", dtype=torch.float32)
    assert net.reconstruction_error is None
    x = torch.randn(2, 8, 4, 4)
    step(net, x)
    assert net.reconstruction_error.shape == ()
    assert 0 < net.reconstruction_error < 1e-5
    with torch.no_grad():
        net[2].f[5].weight.mul_(1e8)
    with pytest.raises(ReconstructionError, match=r"off the true one.*exact=True"):
        step(net, x)
    assert net.reconstruction_error > 1e-1


def test_reconstruction_error_sees_drift_in_any_single_channel():
    class Explode(nn.Module):
        """Loses what one channel of the other half holds."""

        def __init__(self, channel):
            super().__init__()
            self.factor = nn.Parameter(torch.zeros(40))
            self.factor.data[channel] = 1e12

        def forward(self, x):
            return torch.ones_like(x) * self.factor.view(1, -1, 1, 1)

    for channel in (0, 17, 39):
        for position in (0, 1):
            branches = [nn.Identity(), nn.Identity()]
            branches[position] = Explode(channel)
            net = ReversibleSequence([Split(), ReversibleBlock(*branches), Merge()])
            net.watch = Watch(warn_above=math.inf, raise_above=math.inf)
            x = torch.randn(2, 80, 9, 7, requires_grad=True)
            net(x).sum().backward()
            assert net.reconstruction_error > 1e-3


def test_store_measures_no_error():
    net = sequence("store")
    step(net, torch.randn(2, 8, 4, 4, dtype=torch.float64))
    assert net.reconstruction_error is None


def test_second_derivatives_are_refused_with_the_remedy_and_work_under_store():
    def second(value):
        net = sequence(value, depth=1, channels=2, branch=lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.Tanh()))
        x = torch.linspace(-1, 1, 64, dtype=torch.float64).view(1, 4, 4, 4).requires_grad_()
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        return x.grad

    assert second("store").abs().sum() > 0
    with pytest.raises(RuntimeError, match='activations="store"'):
        second("reconstruct")


def test_backward_twice():
    net = sequence("reconstruct")
    y = net(torch.randn(2, 8, 4, 4, dtype=torch.float64)).square().sum()
    y.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    y.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(net.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_parameter_changed_in_place_is_named():
    net = sequence("reconstruct")
    y = net(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    with torch.no_grad():
        net[2].g[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"2\.g\.2\.weight"):
        y.sum().backward()


def test_an_output_modified_in_place_is_autograds_version_error():
    net = sequence("reconstruct")
    y = net(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    loss = y.sum()
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_plan_is_checked():
    layers = [Split(), *blocks(2, 4), Transition(4), Merge()]
    with pytest.raises(ValueError, match=r"one of 'store', 'recompute', 'reconstruct'; got 'keep'"):
        ReversibleSequence(layers, "keep")
    with pytest.raises(ValueError, match="4 values for 5 layers"):
        ReversibleSequence(layers, ["store"] * 4)
    with pytest.raises(ValueError, match=r"layer 3 \(Transition\) to reconstruct"):
        ReversibleSequence(layers, ["reconstruct"] * 5)
    net = ReversibleSequence(layers, ["store", "recompute", "reconstruct", "recompute", "store"])
    assert net.activations == ("store", "recompute", "reconstruct", "recompute", "store")


def test_a_failed_switch_leaves_the_old_value():
    net = sequence("recompute")
    with pytest.raises(ValueError, match="values for"):
        net.activations = ["store"]
    assert net.activations == "recompute"


def test_inverse_over_a_layer_without_one_is_refused():
    net = ReversibleSequence([Split(), *blocks(1, 4), Transition(4), Merge()])
    with pytest.raises(ValueError, match="Transition cannot be inverted"):
        net.inverse(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="Transition has no log-determinant"):
        net.double().forward_and_log_det(torch.randn(2, 8, 4, 4, dtype=torch.float64))


def test_set_activations_switches_values_and_distributes_plans():
    net = nn.Sequential(sequence("store", 1), nn.Tanh(), sequence("store", 2))
    set_activations(net, "recompute")
    assert net[0].activations == net[2].activations == "recompute"
    set_activations(net, ["store", "reconstruct", "store"] + ["recompute"] * 4)
    assert net[0].activations == ("store", "reconstruct", "store")
    assert net[2].activations == ("recompute",) * 4
    with pytest.raises(ValueError, match="6 values for 7 layers"):
        set_activations(net, ["store"] * 6)
    with pytest.raises(ValueError, match="holds no ReversibleSequence"):
        set_activations(nn.Linear(2, 2), "store")
    with pytest.raises(ValueError, match="got 'all'"):
        set_activations(net, "all")


def test_an_odd_number_of_channels_cannot_be_split():
    with pytest.raises(ValueError, match="cannot split 7 channels"):
        sequence("store")(torch.randn(2, 7, 4, 4, dtype=torch.float64))


def test_misuse_of_branches_is_named():
    x1, x2 = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"returned \(2, 4, 4, 4\), the half is \(2, 4, 8, 8\)"):
        AdditiveCoupling(nn.AvgPool2d(2))(x1, x2)
    with pytest.raises(TypeError, match=r"f must be an nn\.Module"):
        ReversibleBlock(torch.relu, nn.Identity())
    with pytest.raises(TypeError, match=r"must return a tuple \(log_scale, shift\)"):
        AffineCoupling(nn.Identity())(x1, x2)
    with pytest.raises(TypeError, match="x1 must be a tensor, got tuple"):
        ReversibleSequence([AdditiveCoupling(nn.Identity())])((x1, x2))


def test_a_parameter_outside_the_branches_of_a_coupling_is_refused():
    class Gated(AdditiveCoupling):
        def __init__(self):
            super().__init__(nn.Linear(3, 3))
            self.gate = nn.Parameter(torch.ones(3))

    with pytest.raises(TypeError, match="'gate' of Gated belongs to no branch"):
        ReversibleSequence([Gated()])(torch.randn(2, 3), torch.randn(2, 3))


def test_a_coupling_without_steps_is_refused():
    class Empty(Coupling):
        pass

    with pytest.raises(TypeError, match="Empty must define `steps`"):
        Empty()(torch.randn(2, 3), torch.randn(2, 3))


def test_mixing_basic_and_other_layers_prints_readably():
    text = repr(ReversibleSequence([Split(), ReversibleBlock(basic(2), basic(2)), Merge()], "recompute"))
    assert "activations='recompute'" in text
    assert "Split(dim=1)" in text


def test_a_tensor_that_a_branch_hides_is_found():
    class Hides(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.layers = [nn.Conv2d(channels, channels, 1, dtype=torch.float64)]

        def forward(self, x):
            return self.layers[0](x)

    with pytest.raises(TypeError, match=r"a tensor of shape .* none of its parameters"):
        step(sequence("reconstruct", branch=Hides), torch.randn(2, 8, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("activations", VALUES)
def test_a_branch_that_changes_its_input_in_place_is_refused(activations):
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    net = sequence(activations, branch=lambda c: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c, c, 1)))
    before = x.clone()
    with pytest.raises(ValueError, match="changes its input in place"):
        net(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("activations", VALUES[1:])
@pytest.mark.parametrize("branch", [basic, BRANCHES["dropout"]], ids=["basic", "dropout"])
def test_a_mode_switched_between_forward_and_backward_does_not_matter(activations, branch):
    def gradients(value, switch):
        net = sequence(value, branch=branch)
        torch.manual_seed(4)
        x = torch.randn(3, 8, 4, 4, dtype=torch.float64, requires_grad=True)
        loss = net(x).square().sum()
        net.train(not switch)
        loss.backward()
        assert all(m.training != switch for m in net.modules())
        return [x.grad, *(p.grad for p in net.parameters())]

    assert relative(gradients(activations, True), gradients("store", False)) <= 1e-10


def test_statistics_changed_between_a_forward_in_eval_mode_and_its_backward_do_not_matter():
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    for activations in VALUES[1:]:
        net = sequence(activations).eval()
        _, truth = step(net, x)
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        loss = net(leaf).square().mean()
        net.train()
        with torch.no_grad():
            net(5 + 3 * x)
        loss.backward()
        assert relative([leaf.grad, *(p.grad for p in net.parameters())], truth) <= 1e-10


def test_drift_of_a_single_example_is_seen():
    class Spike(nn.Module):
        def forward(self, x):
            y = torch.zeros_like(x)
            y[37] = 1e10
            return y

    net = ReversibleSequence([Split(), ReversibleBlock(Spike(), Spike()), Merge()])
    with pytest.warns(ReconstructionWarning):
        step(net, torch.randn(64, 8, 9, 7))


def test_a_frozen_parameter_changed_in_place_is_named():
    net = sequence("recompute")
    net[2].requires_grad_(False)
    y = net(torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        net[2].g[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"2\.g\.2\.weight"):
        y.sum().backward()


def test_cached_parametrizations_get_their_gradients():
    def gradients(activations):
        def branch(channels):
            return nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, channels, 1, dtype=torch.float64))

        net = sequence(activations, branch=branch)
        with nn.utils.parametrize.cached():
            return step(net, torch.linspace(-1, 1, 256, dtype=torch.float64).view(2, 8, 4, 4))[1]

    assert relative(gradients("reconstruct"), gradients("store")) <= 1e-10


def test_a_slice_keeps_its_part_of_the_plan():
    net = ReversibleSequence(blocks(4, 2), ["store", "recompute", "reconstruct", "store"], exact=True)
    assert net[1:3].activations == ("recompute", "reconstruct")
    assert net[1:3].exact is True
    assert net[0] is next(iter(net))
    net.append(blocks(1, 2)[0])
    with pytest.raises(ValueError, match="4 values for 5 layers"):
        net(*torch.randn(2, 2, 2, 4, 4, dtype=torch.float64))


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
