"""Drift is always seen."""

import copy
import math
import pickle
import warnings

import pytest
import torch

from revnet.reversible import ReconstructionError, ReconstructionWarning, Watch
from tests.reversible.networks import sequence, step


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


def test_a_sequence_that_drifts_warns_and_one_that_explodes_raises_before_any_gradient_is_written():
    x = torch.randn(2, 8, 4, 4)
    for scale, expected in ((3e5, pytest.warns(ReconstructionWarning)), (1e8, pytest.raises(ReconstructionError))):
        net = sequence("reconstruct", dtype=torch.float32)
        with torch.no_grad():
            net[2].f[5].weight.mul_(scale)
        with expected:
            step(net, x)
        assert (net[2].f[5].weight.grad is None) == (scale == 1e8)


def test_a_sequence_whose_gradients_are_exact_says_nothing():
    net = sequence("reconstruct", dtype=torch.float32)
    net.exact = True
    step(net, torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_keep_the_thresholds(clone):
    watch = clone(Watch(0.5, 0.75))
    assert (watch.warn_above, watch.raise_above) == (0.5, 0.75)


@pytest.mark.gpu
def test_errors_on_a_device_are_judged_without_waiting_for_it():
    net = sequence("reconstruct", dtype=torch.float32).cuda()
    with torch.no_grad():
        net[2].f[5].weight.mul_(1e8)
    x = torch.randn(2, 8, 4, 4, device="cuda")
    step(net, x)
    torch.cuda.synchronize()
    with pytest.raises(ReconstructionError):
        net(x.requires_grad_())
