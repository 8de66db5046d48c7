"""The units at the border of two stages."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.nn.modules.module import register_module_forward_hook

from revnet.models import get_model, revnet18, revnet38
from revnet.models.branches import BasicBranch, BottleneckBranch
from revnet.models.units import PointwiseShortcut, PoolPadShortcut, TransitionUnit
from revnet.profiling import MemoryTimeline
from revnet.reversible import AdditiveCoupling


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pointwise_shortcut_is_a_strided_convolution_that_keeps_what_it_reads(stride):
    shortcut = PointwiseShortcut(4, 6, stride).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    with MemoryTimeline([x, shortcut.weight]) as timeline:
        y = shortcut(x)
        assert timeline.live() == y.nbytes + (0 if stride == 1 else y.nbytes * 4 // 6)
    expected = conv2d(x, shortcut.weight, stride=stride)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, expected))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("branch", [BasicBranch, BottleneckBranch])
def test_a_transition_and_the_coupling_behind_it_are_the_unit_of_the_paper(branch):
    shortcut = PointwiseShortcut if branch is BottleneckBranch else PoolPadShortcut
    unit = TransitionUnit(branch(8, 16, stride=2), shortcut(8, 16, 2), shortcut(8, 16, 2)).double()
    coupling = AdditiveCoupling(branch(16, 16).double(), swap=True)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    y1, y2 = coupling(*unit(x))
    x1, x2 = x[:, :8], x[:, 8:]
    assert torch.equal(y1, unit.shortcut1(x1) + unit.f(x2.contiguous()))
    assert torch.equal(y2, unit.shortcut2(x2) + coupling.branch(y1))


def test_hooks_on_the_branch_of_a_transition_see_what_it_returns():
    found = []
    for hooked in (True, False):
        torch.manual_seed(0)
        network = revnet38(activations="store", exact=False).double()
        seen, f = [], network.layer2[0].f
        if hooked:
            f.register_forward_hook(lambda _, __, output, seen=seen: seen.append((output, output.clone())))
            f.register_full_backward_hook(lambda *_, seen=seen: seen.append(None))
        network(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
        found.append([p.grad for p in network.parameters()])
        assert len(seen) == (2 if hooked else 0)
        assert not hooked or torch.equal(*seen[0])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("last", [nn.ReLU, nn.Sigmoid, nn.Identity])
def test_a_branch_of_ones_own_may_end_in_anything(last):
    f = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), last())
    unit = TransitionUnit(f, PoolPadShortcut(4, 8, 2), PoolPadShortcut(4, 8, 2)).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    y1, z = unit(x)
    x1, x2 = (half.contiguous() for half in x.chunk(2, 1))
    expected = (unit.shortcut1(x1) + f(x2), unit.shortcut2(x2))
    found, wanted = (
        torch.autograd.grad(sum(part.square().sum() for part in pair), list(f.parameters()))
        for pair in ((y1, z), expected)
    )
    assert all(map(torch.allclose, found, wanted))


@pytest.mark.parametrize("name", ["resnet32", "resnet164"])
def test_a_normalisation_that_returns_its_input_leaves_the_shortcut_s_alone(name):
    network = get_model(name, norm_layer=lambda _: nn.Identity()).eval()
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(network(x), plain(x))


def test_a_hook_on_all_modules_sees_what_they_return():
    seen = []

    def keep(module, _, output):
        if isinstance(output, torch.Tensor):
            seen.append((module, output, output.clone()))

    with register_module_forward_hook(keep):
        network = revnet18(num_classes=3)
        with torch.no_grad():
            network(torch.randn(2, 3, 32, 32))
    changed = [type(module).__name__ for module, output, then in seen if not torch.equal(output, then)]
    assert set(changed) <= {"BatchNorm2d"}  # of which an inplace ReLU makes its own
    sizes = {module: output.shape[-1] for module, output, _ in seen}
    assert (sizes[network.conv1], sizes[network.relu], sizes[network.maxpool]) == (16, 16, 8)
