"""Training steps captured as a CUDA graph and replayed."""

import pytest
import torch

from tests.reversible.networks import MODES, basic, dropout, droppath, sequence

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]


def captured(net, x):
    """The CUDA graph of a training step, and the gradients that each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net(x).square().mean().backward()
    return graph, [x.grad, *(p.grad for p in net.parameters())]


def twins(activations, exact, branch):
    first = sequence(activations, branch=branch, dtype=torch.float32, exact=exact).cuda()
    second = sequence("store", branch=branch, dtype=torch.float32, exact=exact).cuda()
    second.load_state_dict(first.state_dict())
    return first, second


@MODES
@pytest.mark.parametrize("branch", [basic, dropout, droppath])
def test_a_captured_step_gives_the_gradients_of_captured_store(activations, exact, branch):
    nets = twins(activations, exact, branch)
    x = torch.randn(4, 8, 6, 6, device="cuda")
    found = []
    for net in nets:
        leaf = torch.zeros_like(x).requires_grad_()
        graph, gradients = captured(net, leaf)
        for turn in range(2):  # replays draw new random numbers, for new images
            torch.cuda.manual_seed(turn)
            with torch.no_grad():
                leaf.copy_(x + turn)
            graph.replay()
            found.append([g.clone() for g in gradients])
    for own, stored in zip(found[:2], found[2:], strict=True):
        for a, b in zip(own, stored, strict=True):
            assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert not torch.equal(found[0][0], found[1][0])


@MODES
def test_a_captured_step_gives_the_gradients_and_statistics_of_an_eager_one(activations, exact):
    net, eager = twins(activations, exact, basic)
    x = torch.randn(4, 8, 6, 6, device="cuda", requires_grad=True)
    graph, gradients = captured(net, x)
    eager.load_state_dict(net.state_dict())
    graph.replay()
    leaf = x.detach().clone().requires_grad_()
    eager.activations = activations
    eager(leaf).square().mean().backward()
    for a, b in zip(gradients, [leaf.grad, *(p.grad for p in eager.parameters())], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(net.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_replay_writes_the_reconstruction_error():
    net = sequence("reconstruct", dtype=torch.float32, exact=False).cuda()
    x = torch.randn(2, 8, 4, 4, device="cuda", requires_grad=True)
    graph, _ = captured(net, x)
    graph.replay()
    before = float(net.reconstruction_error)
    with torch.no_grad():
        net[2].f[5].weight.mul_(1e8)
    graph.replay()
    assert before < 1e-3
    assert not net.reconstruction_error < 1e-1
