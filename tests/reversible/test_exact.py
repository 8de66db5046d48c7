"""On the fixed-point grid the gradients equal those of store to the bit."""

import pytest
import torch

from revnet import ReversibleBlock, ReversibleSequence
from revnet.models import get_model
from revnet.reversible import Merge, Split
from revnet.reversible.drift import Sample
from revnet.reversible.grid import checksum, range_of, to_grid
from tests.reversible.networks import BRANCHES, Transition, sequence, step

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


@pytest.mark.parametrize(
    ("dtype", "step_size", "bound"), [(torch.float32, 2**-16, 256), (torch.float64, 2**-32, 2**21)]
)
def test_the_grid_has_the_step_and_the_range_that_are_documented(dtype, step_size, bound):
    assert range_of(dtype) == bound
    h = torch.randn(1000, dtype=dtype) * 3
    rounded = to_grid(h, dtype)
    assert torch.equal(rounded / step_size, (h / step_size).round())
    assert (rounded - h).abs().max() <= step_size / 2
    top = torch.tensor(range_of(dtype) - step_size, dtype=dtype)
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
