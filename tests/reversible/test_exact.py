"""On the fixed-point grid the gradients equal those of store to the bit."""

import pytest
import torch
from torch import nn

from revnet import AffineCoupling, ReversibleBlock, ReversibleSequence
from revnet.models import get_model
from revnet.reversible import Merge, ReconstructionWarning, Split
from revnet.reversible.grid import GRID, checksum, range_of, to_grid
from tests.reversible.networks import BRANCHES, sequence, step
from tests.reversible.test_memory import Transition

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

    assert all(map(torch.equal, gradients("reconstruct"), gradients("store")))


def test_inverse_gives_back_every_bit():
    net = sequence("reconstruct", 16, dtype=torch.float32)
    net.exact = True
    net.eval()
    x = to_grid(torch.randn(4, 8, 6, 6), torch.float32)
    assert torch.equal(net.inverse(net(x)), x)


def test_float64_has_a_grid_of_its_own():
    _, truth, _ = exact_step("store", 8, BRANCHES["basic"], dtype=torch.float64)
    _, found, error = exact_step("reconstruct", 8, BRANCHES["basic"], dtype=torch.float64)
    assert all(map(torch.equal, found, truth))
    assert error == 0


def test_values_beyond_the_range_are_seen():
    net = sequence("reconstruct", dtype=torch.float32)
    net.exact = True
    x = torch.randn(4, 8, 6, 6)
    step(net, x)
    assert net.reconstruction_error == 0
    with pytest.warns(ReconstructionWarning, match=r"beyond the threshold of 0\.0"):
        step(net, x * 1e3)
    assert net.reconstruction_error > 0


def test_one_wrong_bit_anywhere_is_seen():
    from revnet.reversible.drift import Sample

    state = (torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6))
    sample = Sample(state, exact=True)
    assert sample.error(state) == 0
    state[1].view(torch.int32)[3, 5, 1, 2] += 1
    assert sample.error(state) > 0
    assert torch.equal(checksum(state), checksum(tuple(x.contiguous(memory_format=torch.channels_last) for x in state)))


@pytest.mark.parametrize("dtype", GRID)
def test_the_grid(dtype):
    step_size = 2.0 ** -GRID[dtype]
    h = torch.randn(1000, dtype=dtype) * 3
    rounded = to_grid(h, dtype)
    assert torch.equal(rounded / step_size, (h / step_size).round())
    assert (rounded - h).abs().max() <= step_size / 2
    top = torch.tensor(range_of(dtype) - step_size, dtype=dtype)
    assert (top + step_size) - step_size == top
    leaf = torch.randn(5, dtype=dtype, requires_grad=True)
    to_grid(leaf, dtype).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(5, dtype=dtype))


class Affine(nn.Module):
    def forward(self, x):
        return x, x


def test_what_cannot_be_exact_is_refused():
    with pytest.raises(ValueError, match=r"layer 1 \(AffineCoupling\) cannot be undone to the bit"):
        ReversibleSequence([Split(), AffineCoupling(Affine()), Merge()], exact=True)
    with pytest.raises(ValueError, match="exact must be True, False or None"):
        ReversibleSequence([Split()], exact="yes")
    half = sequence("reconstruct", dtype=torch.bfloat16)
    half.exact = True
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
        half(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16))


def test_the_output_of_a_layer_without_inverse_is_put_on_the_grid():
    def gradients(activations):
        torch.manual_seed(3)
        blocks = [ReversibleBlock(BRANCHES["basic"](4), BRANCHES["basic"](4)) for _ in range(4)]
        net = ReversibleSequence([Split(), *blocks[:2], Transition(4), *blocks[2:], Merge()], activations, exact=True)
        return step(net, torch.randn(4, 8, 6, 6))[1]

    assert all(map(torch.equal, gradients("reconstruct"), gradients("store")))
