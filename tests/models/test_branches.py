"""The residual branches against the formulas that they stand for."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from revnet.models.branches import BasicBranch, BottleneckBranch, subsample
from revnet.profiling import MemoryTimeline


@pytest.mark.parametrize("preactivate", [True, False])
def test_subsampling_ahead_of_a_pointwise_convolution_is_its_stride(preactivate):
    branch = BottleneckBranch(4, 8, stride=2, preactivate=preactivate).double()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    y = branch(x)
    before = nn.BatchNorm2d(4, eps=1e-3).double()(x).relu() if preactivate else x
    first = conv2d(before, branch.conv1.weight, stride=2)
    expected = branch.conv3(branch.bn3(branch.conv2(branch.bn2(first).relu())).relu())
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, expected))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(7, 6), (1, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_subsampling_and_its_derivatives_are_those_of_a_slice_in_the_layout_of_the_input(memory_format, size):
    x = torch.randn(2, 4, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    y, expected = subsample(x, 2), x[..., ::2, ::2]
    assert torch.equal(y, expected)
    assert y.data_ptr() == x.data_ptr()
    weights = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, x, weights, retain_graph=True)[0] for out in (y, expected))
    assert torch.equal(found, wanted)
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.autograd.gradgradcheck(lambda x: subsample(x.square(), 2).square(), x)
    assert torch.equal(torch.func.vmap(lambda x: subsample(x, 2))(x), expected)
    several = torch.stack([weights, 2 * weights])
    (batched,) = torch.autograd.grad(subsample(x, 2), x, several, is_grads_batched=True)
    assert torch.equal(batched, torch.stack([wanted, 2 * wanted]))


@pytest.mark.parametrize("branch", [BasicBranch, BottleneckBranch])
def test_under_autocast_the_first_relu_keeps_what_the_convolution_reads(branch, monkeypatch):
    module, x = branch(16, 16), torch.randn(2, 16, 8, 8)

    def run():
        leaf = x.clone().requires_grad_()
        with MemoryTimeline([leaf, *module.parameters(), *module.buffers()]) as timeline:
            with torch.autocast("cpu", torch.bfloat16):
                y = module(leaf)
            kept = timeline.live()
        return kept, y, torch.autograd.grad(y.float().square().sum(), [leaf, *module.parameters()])

    lean, y, gradients = run()
    monkeypatch.setattr("revnet.models.branches.as_convolved", lambda x: x)
    plain, expected, wanted = run()
    assert plain - lean == x.nbytes
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


class View(nn.Module):
    """A normalisation that is none."""

    def forward(self, x):
        return x.view(x.shape)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("branch", [BasicBranch, BottleneckBranch])
def test_a_normalisation_that_returns_a_view_of_its_input_leaves_it_as_it_is(branch, inference):
    module, x = branch(8, 8, norm_layer=lambda _: View()), torch.randn(2, 8, 5, 5)
    before = x.clone()
    with torch.inference_mode(inference):
        y = module(x)
    assert torch.equal(x, before)
    torch.vmap(module)(x[None])
    assert torch.equal(x, before)
    module.relu.inplace = False
    assert torch.equal(y, module(x))
