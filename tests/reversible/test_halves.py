"""Splitting a tensor into halves and merging them."""

import pytest
import torch

from revnet.reversible import Merge, Split


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_merged_halves_are_dense_and_do_not_keep_each_other_alive(memory_format):
    x1, x2 = (torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_() for _ in range(2))
    y = Merge()(x1, x2)
    grad = torch.randn(2, 6, 4, 5).contiguous(memory_format=memory_format)
    for found, wanted in zip(torch.autograd.grad(y, (x1, x2), grad), grad.chunk(2, 1), strict=True):
        assert torch.equal(found, wanted)
        assert found.is_contiguous(memory_format=memory_format)
        assert found.untyped_storage().nbytes() == found.nbytes


def test_merging_is_differentiable_twice():
    x1, x2 = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda a, b: Merge()(a, b).pow(3), (x1, x2))


@pytest.mark.parametrize("dim", [1, -1])
def test_split_and_merge_undo_each_other(dim):
    x = torch.randn(3, 4, 6)
    halves = Split(dim)(x)
    assert torch.equal(Merge(dim)(*halves), x)
    assert all(torch.equal(a, b) for a, b in zip(Merge(dim).inverse(x), halves, strict=True))
    with pytest.raises(ValueError, match="cannot split 3 channels"):
        Split()(torch.randn(2, 3))
