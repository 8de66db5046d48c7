"""Drift is always seen."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from revnet import AdditiveCoupling, ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, ReconstructionError, ReconstructionWarning, Split, Watch
from revnet.reversible.drift import Sample
from tests.reversible.networks import EXACT, VALUES, blocks, curved, sequence, step


@pytest.mark.parametrize(
    ("error", "autocast", "exact", "warns"),
    [
        (0.9e-3, False, False, False),
        (1.1e-3, False, False, True),
        (4.9e-2, True, False, False),
        (5.1e-2, True, False, True),
        (1e-7, False, True, True),
        (0.0, True, True, False),
    ],
)
def test_default_thresholds_of_the_warning(error, autocast, exact, warns):
    watch = Watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch.see(torch.tensor(error, dtype=torch.float64), autocast, exact)
    assert [w.category for w in caught] == [ReconstructionWarning] * warns


@pytest.mark.parametrize("error", [0.11, math.nan, math.inf])
def test_an_error_above_a_tenth_or_not_finite_raises(error):
    with pytest.raises(ReconstructionError, match="gradients are worthless"):
        Watch().see(torch.tensor(error), autocast=True, exact=False)


def test_thresholds_are_settable():
    Watch(warn_above=1.0, raise_above=2.0).see(torch.tensor(0.9), autocast=False, exact=True)
    Watch(warn_above=math.inf, raise_above=math.inf).see(torch.tensor(9.0), autocast=False, exact=False)
    with pytest.raises(ReconstructionError, match=r"1\.0e-03 off .* threshold of 1\.0e-04"):
        Watch(raise_above=1e-4).see(torch.tensor(1e-3), autocast=False, exact=False)


@pytest.mark.parametrize("scale", [3e5, 1e8])
def test_a_sequence_that_drifts_warns_and_one_that_explodes_raises_before_any_gradient_is_written(scale):
    net = sequence("reconstruct", dtype=torch.float32, exact=False)
    with torch.no_grad():
        net[2].f[5].weight.mul_(scale)
    explodes = scale == 1e8
    with (
        pytest.raises(ReconstructionError, match=r"off the true one.*exact=True")
        if explodes
        else pytest.warns(ReconstructionWarning, match=r"off the true one.*exact=True")
    ):
        step(net, torch.randn(2, 8, 4, 4))
    assert (net[2].f[5].weight.grad is None) == explodes
    assert (net.reconstruction_error > 1e-1) == explodes


def test_an_exact_sequence_that_leaves_its_range_warns_of_any_difference():
    net = sequence("reconstruct", dtype=torch.float32, exact=True)
    x = torch.randn(4, 8, 6, 6)
    step(net, x)
    assert net.reconstruction_error == 0
    remedy = r"beyond the threshold of 0\.0.*range of the fixed-point grid .*256 in fp32.*exact=False reconstructs"
    with pytest.warns(ReconstructionWarning, match=remedy) as caught:
        step(net, x * 1e3)
    assert not any("exact=True" in str(warning.message) for warning in caught)
    assert 0 < net.reconstruction_error < 1e-3


@EXACT
def test_every_sequence_reports_its_error_on_every_step(exact):
    plans = ("reconstruct", ["reconstruct", "recompute", "reconstruct", "store", "reconstruct", "reconstruct"])
    net = nn.Sequential(*(sequence(plan, dtype=torch.float32, exact=exact) for plan in plans))
    assert [part.reconstruction_error for part in net] == [None, None]
    seen = []
    for _ in range(3):
        step(net, torch.randn(2, 8, 4, 4))
        seen += [part.reconstruction_error for part in net]
    assert all(error.shape == () for error in seen)
    assert all(error == 0 if exact else 0 < error < 1e-5 for error in seen)
    # A new tensor each time.
    assert len({id(error) for error in seen}) == 6


@pytest.mark.parametrize("activations", VALUES[:2])
@EXACT
def test_nothing_is_measured_where_nothing_is_reconstructed(activations, exact):
    net, x = sequence("reconstruct", exact=exact), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    step(net, x)
    assert net.reconstruction_error is not None
    net.activations = activations
    step(net, x)
    assert net.reconstruction_error is None


class Explode(nn.Module):
    """Loses what one channel of the other half holds."""

    def __init__(self, channel):
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(40))
        self.factor.data[channel] = 1e12

    def forward(self, x):
        return torch.ones_like(x) * self.factor.view(1, -1, 1, 1)


@pytest.mark.parametrize("channel", [0, 17, 39])
@pytest.mark.parametrize("position", [0, 1])
@EXACT
def test_drift_in_any_single_channel_is_seen(channel, position, exact):
    branches = [nn.Identity(), nn.Identity()]
    branches[position] = Explode(channel)
    net = ReversibleSequence([Split(), ReversibleBlock(*branches), Merge()], exact=exact)
    net.watch = Watch(warn_above=math.inf, raise_above=math.inf)
    step(net, torch.randn(2, 80, 9, 7), loss=torch.sum)
    assert net.reconstruction_error > 1e-3


class Spike(nn.Module):
    """Loses what one example holds."""

    def forward(self, x):
        y = torch.zeros_like(x)
        y[37] = 1e10
        return y


@EXACT
def test_drift_of_a_single_example_is_seen(exact):
    net = ReversibleSequence([Split(), ReversibleBlock(Spike(), Spike()), Merge()], exact=exact)
    with pytest.warns(ReconstructionWarning):
        step(net, torch.randn(256, 8, 9, 7))


@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", [0, 1])
def test_the_error_of_a_half_of_zeros_is_relative_to_the_other(exact, dtype, half):
    halves = torch.randn(2, 4, 4, 6, 6, dtype=dtype)
    halves[half].zero_()
    net = ReversibleSequence(blocks(4, 4, curved, dtype), exact=exact)
    y1, y2 = net(*halves)
    (y1 * y2).sum().backward()
    assert net.reconstruction_error == 0 if exact else 0 < net.reconstruction_error < 1e-5


@pytest.mark.parametrize("shape", [(128, 64, 32, 32), (64, 32, 14, 14), (32, 197, 384), (8, 16, 16, 32, 32)])
def test_a_sample_is_no_more_than_a_hundredth_of_the_state_and_covers_every_example_and_channel(shape):
    state = (torch.randn(shape), torch.randn(shape))
    sample = Sample(state, exact=False)
    assert sum(part.numel() for part in sample.parts) <= 0.01 * sum(x.numel() for x in state)
    for axis in (0, 1, -1):
        for index in (0, shape[axis] // 2, shape[axis] - 1):
            changed = state[1].clone()
            changed.select(axis, index).zero_()
            assert sample.error((state[0], changed)) > 1e-3


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_keep_the_thresholds(clone):
    watch = clone(Watch(0.5, 0.75))
    assert (watch.warn_above, watch.raise_above) == (0.5, 0.75)


@pytest.mark.gpu
def test_errors_on_a_device_are_judged_without_waiting_for_it():
    net = sequence("reconstruct", dtype=torch.float32, exact=False).cuda()
    with torch.no_grad():
        net[2].f[5].weight.mul_(1e8)
    x = torch.randn(2, 8, 4, 4, device="cuda")
    step(net, x)
    torch.cuda.synchronize()
    with pytest.raises(ReconstructionError):
        net(x.requires_grad_())


class OnItsWay:
    """An event of a device."""

    def __init__(self, arrived):
        self.arrived, self.waited_for = arrived, False

    def query(self):
        return self.arrived

    def synchronize(self):
        self.waited_for = True


def test_all_errors_of_a_step_may_be_on_their_way_until_the_next_forward_pass_but_one():
    """As many as there are chunks."""
    watch = Watch()
    watch.judge_arrived()
    events = [OnItsWay(arrived) for arrived in (True, False, False)]
    for event in events:  # as `see` leaves them where there is a device
        watch._pending.append((watch._passes, torch.zeros(()), event, 1e-3, False))
    watch.judge_arrived()
    assert [event.waited_for for event in events] == [True, False, False]
    watch.judge_arrived()
    assert [event.waited_for for event in events] == [True, True, True]


@EXACT
def test_a_state_of_zeros_is_no_drift(exact):
    net = ReversibleSequence(blocks(4, 4, curved, torch.float32), exact=exact)
    y1, y2 = net(*torch.zeros(2, 3, 4, 6, 6))
    (y1 + y2).sum().backward()
    assert net.reconstruction_error < 1e-3


class Halves(nn.Linear):
    def forward(self, x):
        return super().forward(x).chunk(2, 1)


class Large(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1e18


@EXACT
def test_what_recompute_reconstructs_is_not_judged_for_no_gradient_depends_on_it(exact):
    found, x = [], torch.randn(5, 6)
    for activations in ("recompute", "store"):
        torch.manual_seed(0)
        sequence = ReversibleSequence([Halves(6, 6), AdditiveCoupling(Large(3, 3), swap=True)], activations, exact)
        sequence(x)[1].sum().backward()
        found.append([p.grad for p in sequence.parameters()])
    assert all(map(torch.equal, *found))
